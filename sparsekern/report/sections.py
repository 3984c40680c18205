"""The sections of the page, in their order. None where nothing was measured."""

from collections.abc import Callable

from .models import training, wafer_prediction, writing
from .products import (
    ceilings,
    few_tokens_on_a_gpu,
    many_tokens_on_a_gpu,
    on_a_cpu,
    other_cpus,
    products_of_training,
)
from .view import Section, View

SECTIONS: tuple[Callable[[View], Section | None], ...] = (
    on_a_cpu,
    other_cpus,
    few_tokens_on_a_gpu,
    many_tokens_on_a_gpu,
    products_of_training,
    writing,
    training,
    ceilings,
    wafer_prediction,
)


def sections(view: View) -> list[Section]:
    return [section for make in SECTIONS if (section := make(view))]

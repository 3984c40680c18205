"""python -m sparsekern prune"""

from ..gpt.prune import PruneConfig, prune
from ..report import demo as demo_report


def run_prune(**given) -> None:
    rows = prune(PruneConfig(**given))
    print(f"\n{demo_report.prune_section(rows)}")

"""What is run, in which order, and what was expected of it before the first run.

An arm is one way to spend training; an order is a question and the arms that answer it, each with
the same seeds. Rates are those of full-length sweeps, by a seed that no arm is reported for. A
prediction is a difference of two arms in one metric; where it has a margin, equivalence is tested.
Margins: 0.02 nats are a third of the least cost of 75 % that is expected on code; three seeds show
as much where the differences of seeds have a deviation of 0.008 or less. 0.5 points of sentiment
are finer than three seeds of 5,000 reviews show when 5 % of the answers differ, so that line will
mostly say "different" or "open".
"""

import math
from dataclasses import dataclass, field, replace

from sparsekern.gpt.flops import flop_ratio, train_flops_per_token

from .engine import Shape
from .masks import Sparsity
from .sweep import best, beyond_the_end, finite, rounded

SWEEP_SEED = 100
# Around the best one of 75 % at 5 tokens a parameter, whose sweep began at 1e-3.
FIRST_RATES, TRIED = (4e-3, 8e-3, 1.6e-2), 5
SCALED_FIRST_RATES = (1e-3, 2e-3, 4e-3)  # around the best one of dense, which it should share
# From the best one of 75 % to that of dense, for all: first where the plain small model broke.
NORMED_FIRST_RATES = (8e-3, 4e-3, 2e-3)
FIRST_TUNING_RATES, LEAST_TUNING_RATE, MOST_TUNING_RATE = (3e-4, 1e-3, 3e-3), 3e-5, 3e-2
TASKS = {"sentiment": 2, "webnlg": 5, "code": 1}  # passes over their training rows


@dataclass(frozen=True)
class Size:
    """`small`: the dense shape with the FLOPs that `shape` has at 75 %."""

    shape: Shape
    small: Shape
    tokens: int  # to pre-train on: 20 for each parameter of linear layers and head

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.shape.tokens)


SIZES = {
    "S": Size(Shape(6, 384, 6), Shape(6, 256, 4), 276_000_000),
    "S5": Size(Shape(6, 384, 6), Shape(6, 256, 4), 69_000_000),
    "M": Size(Shape(7, 512, 8), Shape(7, 320, 5), 524_000_000),
    # That everything runs, not that anything is learned.
    "toy": Size(Shape(1, 32, 2, batch=2), Shape(1, 16, 2, batch=2), 12_288),
}


@dataclass(frozen=True)
class Arm:
    """`rate_of`: the arm whose sweep gives its rate, itself where there is none. `start`: the arm
    whose model of the same seed it begins with, to train it on for `share` of that size's steps,
    with a schedule of its own. (No part of the repr, by which results know their arm, as are the
    next three.)"""

    title: str
    sparsity: Sparsity = Sparsity()
    rate_of: str = ""
    is_small: bool = False
    is_short: bool = False  # as few tokens as have the FLOPs of 75 %
    is_scratch: bool = False  # not pre-trained
    tuning_passes: int = 1  # times those of TASKS
    is_tuned_sparse: bool = False  # with its mask too, beside dense
    start: str = field(default="", repr=False)
    is_scaled: bool = field(default=False, repr=False)  # first weights and rates by density
    is_normed: bool = field(default=False, repr=False)  # queries and keys (normed.py)
    first_rates: tuple[float, ...] = field(default=FIRST_RATES, repr=False)  # of its sweep
    share: float = field(default=1.0, repr=False)

    def shape(self, size: Size) -> Shape:
        return replace(size.small if self.is_small else size.shape, is_normed=self.is_normed)

    def steps(self, size: Size) -> int:
        if self.is_scratch:
            return 0
        share = 1 / flop_ratio(size.shape.config(), 0.75) if self.is_short else self.share
        return max(1, round(share * size.steps))

    def flops(self, size: Size) -> float:
        """Of pre-training, its start's with it, as sparsekern/gpt/flops.py counts them."""
        shape, steps = self.shape(size), self.steps(size)
        zeros = 1 - self.sparsity.density(steps)
        own = steps * shape.tokens * train_flops_per_token(shape.config(), zeros)
        return own + (ARMS[self.start].flops(size) if self.start else 0.0)


def longer(share: float, zeros: float = 0.0, rate_of: str = "", kind: str = "pruned") -> Arm:
    """Dense trained on, or pruned and trained on."""
    sparsity = Sparsity(kind, zeros) if zeros else Sparsity()
    title = f"dense pruned to {100 * zeros:g} %" if zeros else "dense"
    title += " in four rounds" * (kind == "rounds") + f", {share:.0%} longer".replace("%", " %")
    return Arm(title, sparsity, rate_of, start="dense", share=share)


ARMS = {
    "dense": Arm("dense"),
    "75": Arm("75 % zeros", Sparsity("static", 0.75), is_tuned_sparse=True),
    "75-scaled": Arm(
        "75 % zeros, scaled",
        Sparsity("static", 0.75),
        first_rates=SCALED_FIRST_RATES,
        is_tuned_sparse=True,
        is_scaled=True,
    ),
    "small": Arm("small dense", is_small=True),
    "short": Arm("dense, fewer tokens", rate_of="dense", is_short=True),
    "scratch": Arm("not pre-trained", rate_of="dense", is_scratch=True),
    "scratch-4": Arm(
        "not pre-trained, tasks 4 times as long", rate_of="dense", is_scratch=True, tuning_passes=4
    ),
    "75-dense": Arm("75 %, dense for the last 13 %", Sparsity("static", 0.75, 0.87), "75"),
    "90-dense": Arm("90 %, dense for the last 13 %", Sparsity("static", 0.9, 0.87), "75"),
    "gradual": Arm("pruned to 75 % while trained", Sparsity("gradual", 0.75), "dense"),
    "50": Arm("50 %", Sparsity("static", 0.5), "75"),
    "90": Arm("90 %", Sparsity("static", 0.9), "75"),
    "rigl": Arm("75 %, RigL", Sparsity("rigl", 0.75), "75"),
    "set": Arm("75 %, SET", Sparsity("set", 0.75), "75"),
    "two-way": Arm("75 %, two-way", Sparsity("two-way", 0.75), "75"),
    "two-way-scaled": Arm(
        "75 %, two-way, scaled", Sparsity("two-way", 0.75), "75-scaled", is_scaled=True
    ),
    "more-10": longer(0.10, rate_of="more-25"),
    "more-25": longer(0.25),
    "more-50": longer(0.50, rate_of="more-25"),
    "pruned-75-25": longer(0.25, 0.75, "pruned-84-25"),
    "pruned-84-10": longer(0.10, 0.838, "pruned-84-25"),
    "pruned-84-25": longer(0.25, 0.838),
    "pruned-84-50": longer(0.50, 0.838, "pruned-84-25"),
    "rounds-84-25": longer(0.25, 0.838, "pruned-84-25", "rounds"),
    "pruned-90-25": longer(0.25, 0.9, "pruned-84-25"),
}

ARMS |= {
    f"{name}-normed": replace(
        arm,
        title=f"{arm.title}, normed",
        rate_of=arm.rate_of and f"{arm.rate_of}-normed",
        start=arm.start and f"{arm.start}-normed",
        is_normed=True,
        first_rates=NORMED_FIRST_RATES,
    )
    for name, arm in ARMS.items()
    if not (arm.is_scaled or arm.is_scratch)
}


@dataclass(frozen=True)
class Prediction:
    """`metric` of arm `a` less that of arm `b`, by seeds: expected between `low` and `high`.

    Metrics: held-out, code and webnlg are nats a token, the last two after dense fine-tuning;
    sentiment, blimp and cloze are percentage points, the last two before it.
    """

    a: str
    b: str
    metric: str
    low: float
    high: float
    margin: float | None = None


@dataclass(frozen=True)
class Order:
    """`swept`: arms whose rates are swept first; then `arms`, each with all `seeds`."""

    number: int
    size: str
    question: str
    swept: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    is_tuned: bool = True
    predictions: tuple[Prediction, ...] = ()


def normed(order: Order) -> Order:
    """The same, of arms whose queries and keys are normed."""
    swept, arms = (tuple(f"{a}-normed" for a in names) for names in (order.swept, order.arms))
    predictions = (replace(p, a=f"{p.a}-normed", b=f"{p.b}-normed") for p in order.predictions)
    return replace(order, swept=swept, arms=arms, predictions=tuple(predictions))


PLAN = (
    Order(1, "S", "Which learning rate is best for each?", ("dense", "75", "small")),
    Order(
        2,
        "S",
        "Is sparse pre-training with dense fine-tuning near dense, and better than what else the "
        "same FLOPs buy?",
        (),
        ("dense", "75", "small", "short", "scratch", "scratch-4"),
        (0, 1, 2),
        predictions=(
            Prediction("75", "dense", "code", 0.06, 0.16, 0.02),
            Prediction("75", "small", "code", -0.04, 0.02, 0.02),
            Prediction("75", "short", "code", -0.02, 0.12, 0.02),
            Prediction("75", "dense", "sentiment", -1.5, -0.5, 0.5),
            Prediction("75", "small", "sentiment", -0.5, 0.5, 0.5),
            Prediction("75", "dense", "webnlg", 0.0, 0.05, 0.02),
            Prediction("75", "dense", "held-out", 0.20, 0.35),
            Prediction("small", "75", "held-out", 0.0, 0.04),
            Prediction("75", "short", "held-out", 0.05, 0.30),
            Prediction("short", "dense", "held-out", 0.05, 0.15),
            Prediction("75", "dense", "blimp", -4.0, -2.0),
            Prediction("75", "dense", "cloze", -3.0, -0.5),
            Prediction("scratch", "dense", "sentiment", -12.0, -3.0),
        ),
    ),
    normed(
        Order(
            3,
            "S",
            "Do dense last steps close the gap? Does pruning while training?",
            (),
            ("75-dense", "90-dense", "gradual"),
            (0, 1, 2),
            predictions=(
                Prediction("75-dense", "dense", "held-out", 0.0, 0.05, 0.02),
                Prediction("75-dense", "short", "held-out", -0.15, 0.0),
                Prediction("90-dense", "dense", "held-out", 0.05, 0.20),
                Prediction("gradual", "75", "held-out", -0.10, -0.02),
                Prediction("75-dense", "dense", "code", 0.0, 0.04, 0.02),
            ),
        )
    ),
    normed(
        Order(
            4,
            "S",
            "How does the cost grow with sparsity, and do moving patterns lower it?",
            (),
            ("50", "90", "rigl", "set"),
            (0, 1, 2),
            is_tuned=False,
            predictions=(
                Prediction("50", "dense", "held-out", 0.07, 0.12),
                Prediction("90", "dense", "held-out", 0.40, 0.60),
                Prediction("rigl", "75", "held-out", -0.06, -0.02),
                Prediction("set", "75", "held-out", -0.06, -0.02),
            ),
        )
    ),
    Order(
        5,
        "S5",
        "Do two-way masks train as well as free ones, at 5 tokens a parameter?",
        ("75",),
        ("75", "two-way"),
        tuple(range(8)),
        is_tuned=False,
        predictions=(Prediction("two-way", "75", "held-out", -0.03, 0.03, 0.03),),
    ),
    normed(
        Order(
            6,
            "M",
            "Does the gap shrink with size?",
            (),
            ("dense", "75", "small", "75-dense", "two-way"),
            (0, 1, 2),
            is_tuned=False,
            predictions=(
                Prediction("75", "dense", "held-out", 0.16, 0.30),
                Prediction("small", "75", "held-out", 0.0, 0.04),
                Prediction("75-dense", "dense", "held-out", 0.0, 0.05, 0.02),
                Prediction("two-way", "75", "held-out", -0.02, 0.02, 0.03),
            ),
        )
    ),
    Order(
        7,
        "M",
        "Do two-way masks train as well as free ones, at 20 tokens a parameter?",
        (),
        ("75-scaled", "two-way-scaled"),
        (0, 1, 2),
        is_tuned=False,
        predictions=(Prediction("two-way-scaled", "75-scaled", "held-out", -0.02, 0.02, 0.03),),
    ),
    normed(
        Order(
            8,
            "S",
            "Does a dense model that is pruned and trained on keep up with dense trained on as "
            "long?",
            ("more-25", "pruned-84-25"),
            (
                "more-25",
                "pruned-84-25",
                "pruned-75-25",
                "pruned-90-25",
                "rounds-84-25",
                "more-10",
                "pruned-84-10",
                "more-50",
                "pruned-84-50",
            ),
            (0, 1, 2),
            is_tuned=False,
            predictions=(
                Prediction("pruned-84-25", "more-25", "held-out", 0.20, 0.38, 0.02),
                Prediction("pruned-84-10", "more-10", "held-out", 0.28, 0.50, 0.02),
                Prediction("pruned-84-50", "more-50", "held-out", 0.18, 0.34, 0.02),
                Prediction("pruned-75-25", "more-25", "held-out", 0.12, 0.25, 0.02),
                Prediction("pruned-90-25", "more-25", "held-out", 0.35, 0.60, 0.02),
                Prediction("rounds-84-25", "pruned-84-25", "held-out", -0.03, 0.02, 0.02),
                Prediction("more-25", "dense", "held-out", -0.08, -0.01),
                Prediction("pruned-75-25", "75", "held-out", -0.20, -0.05),
                Prediction("pruned-75-25", "gradual", "held-out", -0.08, 0.02),
                Prediction("pruned-84-25", "more-25", "blimp", -4.0, -1.0),
            ),
        )
    ),
    # Added after the sweeps of order 1, one run of its 75 % and one of dense. Its seeds were given
    # up for those of order 10, whose training is stable.
    Order(
        9,
        "S",
        "Do first weights and rates that are scaled by density train 75 % better?",
        ("75-scaled",),
    ),
    # Added after the sweeps of orders 1 and 9, whose losses are not smooth in the rate.
    Order(
        10,
        "S",
        "Does the answer stand where a norm of queries and keys keeps high rates stable?",
        ("small-normed", "75-normed", "dense-normed"),
        ("dense-normed", "75-normed", "small-normed", "short-normed"),
        (0, 1, 2),
        predictions=(
            Prediction("dense-normed", "dense", "held-out", -0.03, 0.05),
            Prediction("75-normed", "75", "held-out", -0.08, 0.05),
            Prediction("75-normed", "dense-normed", "code", 0.04, 0.14, 0.02),
            Prediction("75-normed", "small-normed", "code", -0.04, 0.03, 0.02),
            Prediction("75-normed", "short-normed", "code", -0.03, 0.10, 0.02),
            Prediction("75-normed", "dense-normed", "held-out", 0.08, 0.20),
        ),
    ),
)
TOY_SWEPT = ("dense", "75", "75-scaled", "75-normed", "small")
TOY_PLAN = (
    Order(
        1,
        "toy",
        "Does every kind of arm run?",
        TOY_SWEPT,
        (*TOY_SWEPT, "short", "scratch", "75-dense", "gradual", "rigl", "two-way"),
        (0, 1),
        predictions=(Prediction("75", "dense", "code", -1.0, 1.0, 0.02),),
    ),
    Order(
        8,
        "toy",
        "Is a model pruned and trained on?",
        ("more-25", "pruned-84-25"),
        ("more-50", "pruned-84-50", "rounds-84-25"),
        (0, 1),
        is_tuned=False,
    ),
)
PLANS = {"full": PLAN, "toy": TOY_PLAN}

# Where a size without sweeps takes its rates from, and how much of them: larger models bear less,
# and half of the best rate lost 0.00 to 0.04 nats of S, but for 75 % unscaled.
SWEPT_AT = {"M": ("S", 0.5)}


def next_rates(arm: str, losses: dict[float, float]) -> list[float]:
    """Rates to try after these, of which a loss that is not finite is too high: the first ones of
    the arm, then further ones until the best has neighbours on both sides, then between them, until
    TRIED were tried. None where the sweep is done."""
    missing = [rate for rate in ARMS[arm].first_rates if rate not in losses]
    if missing:
        return missing
    if (beyond := beyond_the_end(losses, 2.0)) is not None:
        return [beyond]
    tried = sorted(losses)
    at = tried.index(best(losses))
    between = [rounded(math.sqrt(tried[at] * tried[beside])) for beside in (at + 1, at - 1)]
    return between[: max(0, TRIED - len(losses))]


def best_rate(arm: str, losses: dict[float, float]) -> float | None:
    """None until the sweep is done, or where no rate has a finite loss."""
    if not losses or next_rates(arm, losses):
        return None
    found = best(losses)
    return found if finite(losses[found]) < math.inf else None

"""The experiments that the results page reports: what their source says, the plan, and the studies that are quoted.

Of what a source says only what is known of it stands here, each statement with its mark: "abstract", "abstract, v1" (of
the first version), "author's page" (the first author's public page), "author's summary", "second-hand" (from a summary
of the follow-up).
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "Mehmeti-Göpel and Disselhoff 2023 (arXiv 2211.17180)"
FOLLOW_UP = "Mehmeti-Göpel and Disselhoff 2025 (arXiv 2506.14386)"
FORT = "Fort et al. 2020 (arXiv 2010.15110)"

_EARLY_OR_LATE = (
    "removing nonlinearity early costs significantly more than removing it late (abstract)",
    "the gap depends on the difficulty of the task and vanishes for easy problems (abstract, v1)",
)

_RESNET56 = ("more than 90 % with a ResNet56 at about 3.5 ReLU units on an average path (author's page)",)
_RESNET56_UNKNOWN = "optimizer, epochs, penalty and treatment of BatchNorm behind that number"


@dataclass(frozen=True)
class KnownExperiment:
    """One section of the page.

    Attributes:
        key: name of section, figure and folder.
        title: of the section.
        experiment: installed name.
        plan: name of its plan file beside this one, without ``.toml``.
        source: where the statements are from.
        says: statements of the source, each with its mark.
        unknown: what the source is not known to say, so that nothing here is compared with it.
        studies: quoted, in this order; those that the sweep does not allow are named as such.
        figure: study whose figure is shown.
        cost: what ``ntkdyn sweep ... --plan`` extrapolated; "" where it is unknown.
        earlier: what an earlier version of the plan gave, and why it changed; "" where there was none.
    """

    key: str
    title: str
    experiment: str
    plan: str
    source: str
    says: tuple[str, ...]
    unknown: str
    studies: tuple[str, ...]
    figure: str
    cost: str = ""
    earlier: str = ""

    @property
    def command(self) -> str:
        """What makes the sweep."""
        return f"ntkdyn sweep {self.experiment} --config {self.plan} --out runs/{self.key}"


_MEASURED = "extrapolated by --plan for one core of an AMD EPYC, 2026-11-26"

KNOWN = (
    KnownExperiment(
        key="digits",
        title="the study on pairs of digits",
        experiment="nonlinear-advantage",
        plan="digits",
        source=PAPER,
        says=(
            *_EARLY_OR_LATE,
            "much of the expressivity is unused at the end but helps gradient descent early, in line with the time "
            "evolution of the data-dependent kernel (abstract)",
        ),
        unknown="the gap in numbers, the data sets beside CIFAR-10, any control with random masks",
        studies=("advantage", "relation", "controls"),
        figure="advantage",
        cost=f"756 runs, about 59 minutes ({_MEASURED})",
    ),
    KnownExperiment(
        key="fashion",
        title="ResNet20 on Fashion-MNIST",
        experiment="nonlinear-advantage",
        plan="fashion",
        source=PAPER,
        says=(*_EARLY_OR_LATE, "performance falls slowly as the average path shrinks, then rapidly (abstract, v1)"),
        unknown="any number for this data set",
        studies=("advantage", "controls", "collapse"),
        figure="collapse",
        cost=f"51 runs, about 100 minutes ({_MEASURED})",
    ),
    KnownExperiment(
        key="cifar",
        title="ResNet20 on CIFAR-10",
        experiment="nonlinear-advantage",
        plan="cifar",
        source=PAPER,
        says=(*_EARLY_OR_LATE, "performance falls slowly as the average path shrinks, then rapidly (abstract, v1)"),
        unknown="the gap in numbers, and what a ResNet20 reaches",
        studies=("advantage", "controls", "collapse"),
        figure="collapse",
        cost=f"45 runs, about 2.6 hours ({_MEASURED})",
    ),
    KnownExperiment(
        key="resnet56",
        title="ResNet56 on CIFAR-10",
        experiment="nonlinear-advantage",
        plan="resnet56",
        source=PAPER,
        says=_RESNET56,
        unknown=_RESNET56_UNKNOWN,
        studies=("collapse",),
        figure="collapse",
        cost=f"18 runs, 760,500 steps, about 14 days ({_MEASURED}), or 4.1 hours of one NVIDIA H200 (at the 19 ms "
        "a step, all included, that resnet56_short took there on two processes beside tests)",
    ),
    KnownExperiment(
        key="resnet56-short",
        title="ResNet56 on two of the five batches of CIFAR-10, within eight minutes of one GPU",
        experiment="nonlinear-advantage",
        plan="resnet56_short",
        source=PAPER,
        says=_RESNET56,
        unknown=_RESNET56_UNKNOWN,
        studies=("collapse",),
        figure="collapse",
        cost="4 runs, 22,464 steps, 7.2 minutes of one NVIDIA H200 with two processes (measured, 2026-11-27)",
        earlier="an earlier version of this plan (2026-11-26; learning rate 0.1, 30 epochs) gave: dense 76.9 % (two "
        "seeds); 73.4 % at NAPL 3.51, 70.5 % at 2.09 and 68.6 % at 1.37 (one seed); the three arms of the other seed "
        "diverged, for which the learning rate was halved; passes replayed as CUDA graphs paid for more epochs",
    ),
    KnownExperiment(
        key="translation",
        title="English to German on Multi30k",
        experiment="translation",
        plan="translation",
        source=PAPER,
        says=("machine translation is one of its two domains (abstract)", *_EARLY_OR_LATE),
        unknown="the data set, the details of the Transformer, and any BLEU",
        studies=("translation",),
        figure="translation",
        cost=f"33 runs, about 11 hours ({_MEASURED})",
    ),
    KnownExperiment(
        key="collapse",
        title="accuracy against path length, and shallow networks from scratch",
        experiment="collapse",
        plan="collapse",
        source=PAPER,
        says=(
            "performance falls slowly as the average path length shrinks, then collapses rapidly (abstract, v1)",
            "extracted shallow networks beat networks of similar depth trained from scratch, even when these are "
            "widened to a comparable number of parameters (abstract, v1)",
        ),
        unknown="at which path length the collapse begins",
        studies=("collapse",),
        figure="collapse",
        cost=f"114 runs, about 3.5 minutes ({_MEASURED})",
    ),
    KnownExperiment(
        key="core-network",
        title="the core that a fixed price per unit leaves",
        experiment="core-network",
        plan="core_network",
        source=PAPER,
        says=(
            "for a fixed penalty weight the network shrinks to a core of nearly the same shape, effective depth and "
            "width, whatever width or depth it began with (abstract; author's page)",
            "the shape depends on the difficulty of the task (abstract; author's page)",
            "the units that survive lie mostly in the middle of the network (author's page)",
        ),
        unknown="the formula of the effective width, and the penalty weights",
        studies=("core-network",),
        figure="core-network",
        cost=f"180 runs, about 21 minutes ({_MEASURED})",
    ),
    KnownExperiment(
        key="layerwise-vs-channelwise",
        title="slopes of layers against slopes of channels",
        experiment="layerwise-vs-channelwise",
        plan="layerwise",
        source=FOLLOW_UP,
        says=(
            "channel by channel beats layer by layer on ImageNet below NAPL 12 and is comparable above (second-hand)",
            "on CIFAR-100 the gap is significant for NAPL 3 to 5, on CIFAR-10 it appears at lower NAPL (second-hand)",
            "from a ResNet56 the gap nearly vanishes for NAPL above 4 (second-hand)",
        ),
        unknown="anything on data as small as these",
        studies=("layerwise-vs-channelwise",),
        figure="layerwise-vs-channelwise",
        cost=f"132 runs, about 1.9 minutes ({_MEASURED})",
    ),
    KnownExperiment(
        key="linearized-training",
        title="linear in the weights, linear in the units",
        experiment="linearized-training",
        plan="linearized_training",
        source=FORT,
        says=(
            "of children that are linear in the weights only those from very early epochs lose to the network, and the "
            "loss disappears quickly (author's summary)",
            "the kernel moves fast in the first epochs and at constant velocity afterwards (abstract)",
        ),
        unknown="anything on children that are linear in the units, which are from arXiv 2211.17180",
        studies=("linearized-training",),
        figure="linearized-training",
        cost=f"78 runs, about 1 minute ({_MEASURED})",
    ),
)
"""In the order of the page."""

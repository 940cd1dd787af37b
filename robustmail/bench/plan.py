"""The steps of the plan, in order: cheap ones first, so that a mistake shows before days of training.

Each is a command of its own. What it measured lies in a JSON file, of which the plan keeps a copy with provenance.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

__all__ = ["METHODS", "PlanStep", "plan_steps"]

CHECKOUT = Path(__file__).resolve().parents[2]
DEVICE_TESTS = ("tests/models", "tests/runtime/test_deferred.py", "tests/evaluation/test_devices.py")
METHODS = ("mail_trades", "trades")
SMALL_RUN = ("data=digits()", "model=small_cnn", "epochs=2", "burn_in=1", "batch=512", "validate=pgd10")


@dataclass(frozen=True)
class PlanStep:
    """One step: what it does, the words after `python`, and where they leave what was measured.

    needs: names of steps without which it cannot begin. todo: what to do where it fails.
    """

    name: str
    about: str
    words: tuple[str, ...]
    measured: Path
    todo: str
    needs: tuple[str, ...] = ()
    cwd: Path | None = None

    @property
    def command(self) -> str:
        """For a shell and for people; it tells two plans apart."""
        return shlex.join(["python", *self.words])


def plan_steps(folder: Path, device: str, small: bool) -> list[PlanStep]:
    """The plan.

    folder: of everything that it writes. device: as `pick_device` takes it.
    small: handwritten digits, narrow networks, two epochs, 20 images: to try the plan itself in minutes.
    """
    # Only the tests run elsewhere, in the checkout: so their file has a whole path.
    junit = folder.resolve() / "work" / "tests.xml"
    tests = DEVICE_TESTS[-1:] if small else DEVICE_TESTS
    size = ("cifar_resnet18_w8", "8") if small else ("cifar_resnet18", "128")
    settings = ("--device", device, "--model", size[0], "--batch", size[1])
    smoke = ("epochs=2", "burn_in=1", "evaluate=nat") if small else ()
    work = folder / "work"

    def verb(*words: str) -> tuple[str, ...]:
        return ("-m", "robustmail", *words)

    def ours(what: str) -> tuple[str, ...]:
        return ("-m", "robustmail.bench.plan_measurements", what, *settings, "--out", str(work / f"{what}.json"))

    steps = [
        PlanStep(
            "tests", "the tests that touch a device",
            ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *tests), junit,
            "Work in a checkout of the repository, with pytest installed; report what fails.", cwd=CHECKOUT,
        ),
        PlanStep(
            "quickstart", "a run that anything wrong with the installation or the driver would stop",
            verb("run", "quickstart", f"device={device}", *smoke, "--out", str(work / "quickstart"), "--plain"),
            work / "quickstart" / "results.json", "See docs/installation.md: torch and the driver must fit together.",
        ),
        PlanStep(
            "graphs", "CUDA graphs beside plain passes: the same numbers, and how much faster", ours("graphs"),
            work / "graphs.json", "ROBUSTMAIL_CUDA_GRAPHS=0 goes on without them; report it.",
        ),
        PlanStep(
            "bench", "speed beside the plain loop, torchattacks and ART",
            verb("bench", *settings, *(("--repeats", "1") if small else ()), "--out", str(work / "bench")),
            work / "bench" / f"bench-{size[0]}-{size[1]}.json", "Lower --batch in the command if memory ran out.",
        ),
        PlanStep(
            "profile", "where a training step spends its time", ours("profile"), work / "profile.json",
            "Nothing else needs it; report it.",
        ),
    ]  # fmt: skip
    return steps + [step for name in METHODS for step in _train_and_attack(name, work, device, small)]


def _train_and_attack(name: str, work: Path, device: str, small: bool) -> list[PlanStep]:
    run, evaluation = work / "runs" / name, work / "evals" / name
    changes = SMALL_RUN if small else ("epochs=100",)
    train = ("run", name, f"device={device}", *changes, 'evaluate=("nat","pgd100")', "--out", str(run), "--plain")
    attack = ("eval", str(run), "--attacks", "nat,pgd100,aa", "--n", "20" if small else "1000", "--device", device,
              "--out", str(evaluation), "--plain")  # fmt: skip
    images = "handwritten digits, 2 epochs" if small else "all of CIFAR-10, 100 epochs"
    return [
        PlanStep(
            name, f"training on {images}", ("-m", "robustmail", *train), run / "results.json",
            "The same command again goes on where it stopped.",
        ),
        PlanStep(
            f"aa-{name}", f"AutoAttack on {'20' if small else '1,000'} test images", ("-m", "robustmail", *attack),
            evaluation / "results.json", "The same command again goes on where it stopped.", needs=(name,),
        ),
    ]  # fmt: skip

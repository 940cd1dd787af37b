"""What plugins remember: read before a step, written after its update, and the same however the batch is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from robustmail import (
    AT,
    HAT,
    Affine,
    SelfAdaptive,
    Sigmoid,
    State,
    Step,
    Terms,
    fit,
    per_class,
    per_example,
    per_run,
    remembers,
    target_confidence,
)
from robustmail.contracts import broken_laws
from robustmail.errors import ModelError, NonFiniteError, RecipeError, RunError
from robustmail.functional import ce
from robustmail.memory import Memory
from robustmail.records import StepFinished
from robustmail.step import Context
from robustmail.train.memory import MemoryTables
from robustmail.train.run import run
from tests.train.conftest import recipe

CPU = torch.device("cpu")
INDEX, Y = torch.tensor([4, 1, 3, 1]), torch.tensor([0, 2, 0, 2])


def tables(**declared: Memory) -> MemoryTables:
    return MemoryTables(declared, [torch.tensor([1, 2, 0]), torch.tensor([0, 0])], classes=3, device=CPU)


# Tables


def test_rows_begin_as_declared_and_each_kind_is_read_by_example():
    made = tables(a=per_example(start=0.5), b=per_example("classes", start="label"), c=per_class(2), d=per_run())
    rows = made.rows(INDEX, Y)
    assert rows["a"].tolist() == [0.5] * 4
    assert rows["b"].argmax(1).tolist() == [0, 2, 0, 2]
    assert [tuple(rows[name].shape) for name in "abcd"] == [(4,), (4, 3), (4, 2), (4,)]


def test_a_class_and_the_run_keep_a_moving_mean_and_an_example_its_own_row():
    made = tables(own=per_example(), kind=per_class(start=1.0, decay=0.9), all=per_run(start=2.0, decay=0.5))
    new = torch.tensor([1.0, 2.0, 3.0, 6.0])
    made.write(INDEX, Y, {"own": new, "kind": new, "all": new})
    assert made.tables["own"].tolist() == [0, 4, 0, 3, 1], "an image that is drawn twice keeps the mean"
    assert made.tables["kind"].tolist() == pytest.approx([0.9 + 0.1 * 2, 1.0, 0.9 + 0.1 * 4])
    assert made.tables["all"].tolist() == [0.5 * 2 + 0.5 * 3]


def test_a_batch_in_another_order_leaves_the_same_rows():
    new = torch.randn(4, 3)
    left = []
    for to in ([0, 1, 2, 3], [2, 3, 1, 0]):
        made = tables(own=per_example("classes"), kind=per_class("classes", decay=0.3))
        made.write(INDEX[to], Y[to], {"own": new[to], "kind": new[to]})
        left.append(made.tables)
    for name, table in left[0].items():
        torch.testing.assert_close(table, left[1][name], rtol=1e-6, atol=1e-7)


def test_a_write_can_be_undone():
    made = tables(own=per_example(start=7.0), kind=per_class())
    for overwritten in made.write(INDEX, Y, {"own": torch.rand(4), "kind": torch.rand(4)}):
        overwritten.restore()
    assert made.tables["own"].tolist() == [7.0] * 5
    assert made.tables["kind"].tolist() == [0.0] * 3


def test_saved_tables_of_another_recipe_are_refused():
    made = tables(own=per_example())
    with pytest.raises(ValueError, match="expected"):
        made.load_state_dict({}, in_burn_in=False)
    made.load_state_dict({}, in_burn_in=True)
    with pytest.raises(ValueError, match="another shape"):
        made.load_state_dict({"own": torch.zeros(4)}, in_burn_in=False)


# What a plugin meets


def step_of(declared: dict[str, Memory], rows: dict[str, torch.Tensor]) -> Step:
    x = torch.rand(4, 3, 8, 8)
    return Step(nn.Flatten(), x, Y, x, context=Context(INDEX, 3, 9, declared, rows))


def test_a_step_knows_places_and_epochs_and_a_written_row_of_an_example_is_new_at_once():
    declared = {"own": per_example(decay=0.75), "kind": per_class(decay=0.75)}
    step = step_of(declared, {"own": torch.ones(4), "kind": torch.ones(4)})
    step.detached().remember(own=torch.full((4,), 5.0), kind=torch.full((4,), 5.0))
    assert (step.index.tolist(), step.epoch, step.epochs) == (INDEX.tolist(), 3, 9)
    assert step.memory["own"].tolist() == [2.0] * 4, "0.75 of 1 and 0.25 of 5"
    assert step.memory["kind"].tolist() == [1.0] * 4, "the mean over the class is not known yet"
    assert step.again().memory["own"].tolist() == [1.0] * 4
    assert step.part(slice(1, 3)).index.tolist() == [1, 3]


WRONG = {
    "outside of training": (lambda s: Step(None, None, Y, None).memory, "step.memory: only training knows it"),
    "no teacher": (lambda s: s.teacher(s.x), "step.teacher: the recipe has no teacher"),
    "another name": (lambda s: s.remember(owm=torch.zeros(4)), "Did you mean 'own'"),
    "another shape": (lambda s: s.remember(own=torch.zeros(4, 2)), r"got \[4, 2\], expected rows \[4\]"),
    "no tensor": (lambda s: s.remember(own=1.0), r"got float, expected rows \[4\]"),
}


@pytest.mark.parametrize(("use", "said"), WRONG.values(), ids=WRONG)
def test_what_a_step_does_not_know_is_told(use, said):
    with pytest.raises(RecipeError, match=said):
        use(step_of({"own": per_example()}, {"own": torch.zeros(4)}))


@pytest.mark.parametrize(("make", "said"), [
    (lambda: per_example(decay=1.0), "decay must be"), (lambda: per_example(0), "no shape"),
    (lambda: per_example(start="label"), "label"), (lambda: per_run(start=float("nan")), "finite"),
    (lambda: per_example("class"), "no shape"),
])  # fmt: skip
def test_a_declaration_out_of_range_is_refused(make, said):
    with pytest.raises(RecipeError, match=said):
        make()


def test_two_plugins_that_declare_one_name_in_two_ways_are_refused():
    with pytest.raises(RecipeError, match=r"memory 'targets'.*Give it another name"):
        recipe.but(objective=SelfAdaptive(decay=0.5), margin=target_confidence(), weighter=Affine(alpha=1.0))


def test_the_formula_says_what_is_remembered():
    made = recipe.but(objective=SelfAdaptive())
    assert "remembers targets: [classes] per example, its label at first, decay 0.9" in made.formula


# Laws


@remembers(loss=per_example(decay=0.9))
def slow_loss(step: Step) -> torch.Tensor:
    step.remember(loss=ce(step.logits_adv, step.y))
    return -step.memory["loss"]


@remembers(loss=per_example())
def of_the_batch(step: Step) -> torch.Tensor:
    loss = ce(step.logits_adv, step.y)
    step.remember(loss=loss / loss.sum())
    return -loss


@remembers(loss=per_example())
def of_the_place(step: Step) -> torch.Tensor:
    step.remember(loss=torch.arange(len(step.y)))
    return -ce(step.logits_adv, step.y)


def test_a_margin_with_memory_is_lawful_and_what_it_remembers_is_the_examples_own():
    assert broken_laws(slow_loss, "margin") == {}
    assert broken_laws(target_confidence(), "margin") == {}
    for plugin in (of_the_batch, of_the_place):
        assert list(broken_laws(plugin, "margin")) == ["remembers of an example what is its own"]


@pytest.mark.parametrize("objective", [HAT(), SelfAdaptive(), SelfAdaptive(start=0)])
def test_objectives_with_teacher_and_memory_are_lawful(objective):
    assert broken_laws(objective, "objective") == {}


# Training


def memory_after(recipe, **changes) -> dict[str, torch.Tensor]:
    state = State.fresh(recipe.but(**changes))
    for _ in fit(state.recipe, state):
        pass
    return state.memory.tables


@pytest.mark.long
def test_training_commits_what_each_step_hands_back():
    """A table that counts: every image is visited once an epoch."""

    @remembers(visits=per_example(), last=per_run())
    def counting(step: Step) -> Terms:
        step.remember(visits=step.memory["visits"] + 1, last=torch.full_like(step.memory["last"], step.epoch))
        return Terms(ce(step.logits_adv, step.y))

    left = memory_after(recipe, objective=counting, margin=None, weighter=None)
    assert left["visits"].unique().tolist() == [recipe.epochs]
    assert left["last"].tolist() == [recipe.epochs - 1]


@pytest.mark.long
def test_targets_move_as_in_the_published_formula():
    """t <- 0.9 t + 0.1 p(x), from the label on, with p the prediction before the update."""
    seen = {}

    class Watched(SelfAdaptive):
        def __call__(self, step):
            terms = super().__call__(step)
            if len(step.y) > 4:  # the forecast has a dry run of four images
                seen.update(zip(step.index.tolist(), step.probs_nat.detach().numpy().astype(float), strict=True))
            return terms

    state = State.fresh(recipe.but(objective=Watched(start=0), epochs=1, margin=None, weighter=None))
    for _ in fit(state.recipe, state):
        pass
    assert len(seen) == len(state.train.y)
    for index, target in enumerate(state.memory.tables["targets"].numpy()):
        expected = 0.9 * np.eye(state.images.classes)[int(state.train.y[index])] + 0.1 * seen[index]
        np.testing.assert_allclose(target, expected, atol=1e-6)


@pytest.mark.long
def test_micro_batches_leave_the_memory_of_the_whole_batch():
    whole, cut = (
        memory_after(recipe, epochs=1, objective=SelfAdaptive(start=0), margin=None, weighter=None, accumulate=n,
                     model="small_cnn", precision="fp32")
        for n in (1, 3)
    )  # fmt: skip
    assert (whole["targets"].amax(1) < 1).all(), "nothing has moved, so nothing was tested"
    torch.testing.assert_close(whole["targets"], cut["targets"], rtol=0, atol=2e-3)  # three steps of PGD's signs


def test_a_step_that_fails_remembers_nothing():
    @remembers(visits=per_example())
    def bursting(step: Step) -> Terms:
        step.remember(visits=step.memory["visits"] + 1)
        loss = ce(step.logits_adv, step.y)
        return Terms(loss / 0.0 if step.epoch == 1 else loss)

    state = State.fresh(recipe.but(objective=bursting, margin=None, weighter=None, epochs=2))
    with pytest.raises(NonFiniteError):
        for _ in fit(state.recipe, state):
            pass
    assert state.memory.tables["visits"].unique().tolist() == [1.0]


@pytest.mark.long
def test_a_margin_begins_to_remember_after_the_burn_in():
    made = recipe.but(margin=slow_loss, weighter=Sigmoid(slope=1.0, bias=0.0), burn_in=1, epochs=2)
    state, zero_after_first = State.fresh(made), None
    for record in fit(made, state):
        if not isinstance(record, StepFinished) and state.epoch == 1 and zero_after_first is None:
            zero_after_first = bool((state.memory.tables["loss"] == 0).all())
    assert zero_after_first
    assert (state.memory.tables["loss"] > 0).all()


# Teacher


@pytest.mark.long
def test_a_teacher_from_a_file_is_asked_and_never_trained(tmp_path):
    list(run(recipe.but(epochs=1, evaluate=("nat",)), tmp_path / "teacher", "teacher"))
    made = recipe.but(teacher=str(tmp_path / "teacher"), objective=HAT(), margin=None, weighter=None, epochs=1)
    state = State.fresh(made)
    before = [p.clone() for p in state.teacher.model.parameters()]
    assert "SHA-256" in state.note
    for _ in fit(made, state):
        pass
    assert all(map(torch.equal, before, state.teacher.model.parameters()))
    assert not any(p.requires_grad for p in state.teacher.model.parameters())


def test_the_moving_average_can_be_the_teacher():
    class Follow(AT):
        def __call__(self, step):
            kind = step.teacher(step.x)
            assert not kind.requires_grad
            return Terms(ce(step.logits_adv, kind.softmax(1)))

    made = recipe.but(teacher="ema", ema=0.9, objective=Follow(), margin=None, weighter=None, epochs=1)
    state = State.fresh(made)
    assert state.teacher.model is state.averages.ema.module
    for _ in fit(made, state):
        pass
    with pytest.raises(RecipeError, match="no moving average"):
        recipe.but(teacher="ema")


@pytest.mark.long
def test_another_teacher_is_another_run_and_a_file_may_move(tmp_path):
    for seed in (1, 2):
        list(run(recipe.but(epochs=1, evaluate=("nat",), seed=seed), tmp_path / f"t{seed}", "teacher"))
    made = recipe.but(teacher=str(tmp_path / "t1"), objective=HAT(), margin=None, weighter=None, evaluate=("nat",))
    list(run(made, tmp_path / "run", "hat"))
    (tmp_path / "t1").rename(tmp_path / "moved")
    list(run(made.but(teacher=str(tmp_path / "moved")), tmp_path / "run", "hat"))
    with pytest.raises(RunError, match=r"another recipe.*teacher\.sha256"):
        list(run(made.but(teacher=str(tmp_path / "t2")), tmp_path / "run", "hat"))
    with pytest.raises(RunError, match="another recipe"):
        list(run(made.but(teacher="ema", ema=0.9), tmp_path / "run", "hat"))
    with pytest.raises(ModelError, match=r"teacher=.*no such file"):
        State.fresh(made.but(teacher=str(tmp_path / "none")))


def test_the_helper_of_hat_is_outside_and_its_label_the_teachers(real_images):
    """CE(x) + gamma CE(f(x + 2 d), argmax g(x + d)), with linear f and g, against numpy."""
    torch.manual_seed(0)
    x, y = real_images[0][:4], real_images[1][:4]
    d = 8 / 255 * torch.randn_like(x).sign()
    f, g = (nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10)) for _ in range(2))
    context = Context(torch.arange(4), 0, 1, teacher=lambda images: g(images).detach())
    terms = HAT(beta=2.5, gamma=0.5)(Step(f, x, y, x + d, context=context))
    weight, bias = (t.detach().double().numpy() for t in f[1].parameters())

    def log_p(images):
        z = images.flatten(1).double().numpy() @ weight.T + bias
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    rows = np.arange(4)
    label = g(x + d).argmax(1).numpy()
    nat, adv = log_p(x), log_p(x + d)
    plain = -nat[rows, y.numpy()] - 0.5 * log_p(x + 2 * d)[rows, label]
    np.testing.assert_allclose(terms.plain.detach(), plain, atol=1e-5)
    np.testing.assert_allclose(terms.weighted.detach(), 2.5 * (np.exp(nat) * (nat - adv)).sum(1), atol=1e-5)

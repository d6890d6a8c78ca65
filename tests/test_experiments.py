"""The experiments that come with the project, and suites whose networks are trained by several recipes."""

import ast
from dataclasses import replace

import pytest

from anytime.backend import TorchNet
from anytime.backends.float import Float32
from anytime.config import Suite
from anytime.cost import account
from anytime.datasets.cifar import CIFAR10
from anytime.datasets.synthetic import Synthetic
from anytime.errors import UsageError
from anytime.facts import facts_of
from anytime.find import experiment, names, path_of
from anytime.losses import Joint, Rising
from anytime.models.resnet import ResNet20
from anytime.models.sdn import SDN
from anytime.models.sparse_resnet import SparseResNet
from anytime.models.static import Static
from anytime.policies.fixed import Fixed
from anytime.policies.risk import RiskControl
from anytime.record import load
from anytime.rows import rows
from anytime.run import Runner
from anytime.spec import key
from experiments.common import JOINT_EPOCHS, cifar_recipe, trunk_first_recipe
from tests import test_run
from tests.worlds import Tiny


def small(**fields):
    return test_run.experiment(**{"backends": (Float32(),), "boards": (), "budgets": (0.7,), **fields})


def trainings(exp):
    """Keys of everything that it trains; what the published data are is not part of them."""
    return {key((c.data, c.model, c.recipe, c.train_seed, c.seed)) for c in exp.cells()}


@pytest.mark.parametrize("name", names())
def test_every_experiment_says_its_question_and_its_command(name):
    exp = experiment(name)
    said = ast.get_docstring(ast.parse(path_of(name).read_text()))
    assert exp.question in " ".join(said.split())
    assert f"make exp EXP={name}" in said or name == "quickstart"
    assert len({f.name for f in facts_of(exp)}) == len(list(facts_of(exp)))


def test_experiments_share_their_trainings():
    sdn, smaller = trainings(experiment("baselines_sdn")), trainings(experiment("exit_or_smaller"))
    shared = {key((CIFAR10(), model, trunk_first_recipe(), 0, 0)) for model in (SDN("resnet56"), Static(SDN("resnet56")))}
    assert shared == sdn & smaller
    assert key((CIFAR10(), SparseResNet(), cifar_recipe(Joint()), 0, 0)) in smaller
    # A key that moves trains for hours again: a field without a default, or a default that was changed.
    assert key((CIFAR10(), SDN("resnet56"), trunk_first_recipe(), 0, 0)) == "bbbb7cec51f0"


def test_the_budgets_of_exit_or_smaller_are_what_the_smaller_networks_cost():
    exp = experiment("exit_or_smaller")
    macs = []
    for spec in exp.suites[0].models[:4]:
        macs.append(account(TorchNet(spec.build((3, 32, 32), 10), {}, simulated=False), (3, 32, 32)).macs[-1])
    for spent in macs[1:]:
        assert min(abs(spent / macs[0] - budget) for budget in exp.budgets) < 1e-3


def test_networks_of_one_suite_may_have_recipes_of_their_own(tmp_path):
    plain = small().recipe
    others = ((Tiny(), replace(plain, epochs=1)), (Tiny(), replace(plain, loss=Rising())))
    exp = small(suites=(replace(small().suites[0], others=others),))
    cells = list(exp.cells())
    assert [c.recipe for c in cells] == [plain, plain, *(recipe for _, recipe in others)]
    Runner(exp, tmp_path, log=lambda line: None).run()
    records = [r for r, _ in load(tmp_path / "records", "small").records]
    assert sorted(r.kind for r in records) == ["decide"] * 3 + ["eval"] * 4
    assert len({r.cell for r in records}) == 4 == len(list((tmp_path / "cache" / "trained").iterdir()))
    table = rows(tmp_path / "records", "small")
    assert len(table[["model", "variant"]].drop_duplicates()) == 4  # rows of equal labels are told apart


def test_a_checkpoint_that_is_not_there_is_a_row_that_fails_and_the_rest_goes_on(tmp_path):
    data = Synthetic(n=800, size=32, channels=3, n_classes=4)
    said = []
    exp = small(suites=(Suite(data, (Static(Tiny()), ResNet20("nowhere/resnet20.th"))),), policies=())
    Runner(exp, tmp_path, log=said.append).run()
    kinds = {r.facts["model"]: (r.kind, r.reason) for r, _ in load(tmp_path / "records", "small").records}
    assert kinds["Tiny static"][0] == "eval"
    kind, reason = kinds["ResNet-20 from resnet20.th"]
    assert kind == "fail" and reason.startswith("there is no file nowhere/resnet20.th: give the path")


def test_suites_that_cannot_be_meant_are_refused():
    suite = small().suites[0]
    with pytest.raises(UsageError, match="Tiny static on Synthetic.* is named twice; name it once, in one suite"):
        small(suites=(suite, replace(suite, models=(Tiny(width=4), suite.models[0]))))
    with pytest.raises(UsageError, match="a suite has no models"):
        small(suites=(replace(suite, models=(), others=((Tiny(), small().recipe),)),))


def test_policies_that_a_table_could_not_tell_apart_are_refused():
    small(policies=(RiskControl(), RiskControl(delta=0.01), Fixed()))
    with pytest.raises(UsageError, match="two policies are called 'Fixed' in tables"):
        small(policies=(Fixed(exit=0), RiskControl(), Fixed(exit=1)))


def test_a_recipe_of_another_is_overridden_by_its_place():
    exp = experiment("exit_or_smaller", ["suites.*.others.*.1.epochs=1"])
    assert exp.suites[0].others[0][1].epochs == 1 and exp.recipe.epochs == JOINT_EPOCHS

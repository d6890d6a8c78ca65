"""The command line as a user meets it: one sentence for a mistake, the right exit code, no traceback."""

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anytime.__main__ import main

ROOT = Path(__file__).parent.parent

EXPERIMENT = """
from anytime.backends.float import Float32
from anytime.backends.ptq import PTQ
from anytime.config import Experiment, Suite
from anytime.datasets.npz import Npz
from anytime.datasets.synthetic import Synthetic
from anytime.models.branchynet import BLeNet
from anytime.models.static import Static
from anytime.policies.confidence import Entropy
from anytime.train import Recipe

EXPERIMENT = Experiment(
    name="mine",
    question="Mine?",
    suites=(Suite({data}, (Static(BLeNet()), BLeNet())),),
    recipe=Recipe(epochs=1),
    backends=(Float32(), PTQ()),
    policies=(Entropy(),),
    budgets=(0.5,),
)
"""
SMALL = "Synthetic(n=800, noise=0.25)"


def anytime(*args, cwd, env=None, limit=None):
    """Run the command; answer (exit code, stdout, stderr)."""
    ran = subprocess.run(
        [sys.executable, "-m", "anytime", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with a user's own experiment, run once."""
    home = tmp_path_factory.mktemp("user")
    (home / "mine.py").write_text(EXPERIMENT.format(data=SMALL))
    assert anytime("run", home / "mine.py", cwd=home)[0] == 0
    return home


def wrong(answer, code, *said):
    """One sentence with the fix, and that exit code."""
    got, out, err = answer
    assert got == code, (got, out, err)
    assert "Traceback" not in err and "Traceback" not in out
    last = err.strip().splitlines()[-1]
    assert last.startswith("anytime: ") and all(s in err for s in said), err


def test_it_runs_prints_the_table_and_says_where_it_lies(ran):
    code, out, err = anytime("run", "mine.py", cwd=ran)
    assert code == 0 and "everything is there" in err
    assert "FP32" in out and "INT8 PTQ" in out and "results/tables/mine.md" in out
    assert {p.name for p in (ran / "results" / "tables").iterdir()} == {"mine.md", "mine.csv", "mine.tex"}
    assert (ran / "results" / "figures" / "mine.svg").stat().st_size > 1000


def test_list_cite_report_and_clean_cache(ran):
    assert "7 done, 0 todo" in anytime("list", "mine.py", cwd=ran)[1]
    assert "BranchyNet" in anytime("cite", "mine.py", cwd=ran)[1]
    table = (ran / "results" / "tables" / "mine.md").read_bytes()
    assert anytime("report", "mine.py", cwd=ran)[0] == 0
    assert (ran / "results" / "tables" / "mine.md").read_bytes() == table
    code, out, _ = anytime("clean-cache", cwd=ran)
    assert code == 0 and "nothing was deleted" in out and (ran / "results" / "cache" / "trained").is_dir()


def test_scripts_get_json_and_silence(ran, tmp_path):
    said = json.loads(anytime("list", "mine.py", "--json", cwd=ran)[1])
    assert said["total"] == {"done": 7, "todo": 0, "skip": 0, "fail": 0} and said["lines"][0]["dataset"].startswith("Synthetic")
    assert "BranchyNet" in json.loads(anytime("cite", "mine.py", "--json", cwd=ran)[1])["BLeNet"]
    shutil.copytree(ran / "results", tmp_path / "r")
    for path in (tmp_path / "r" / "records" / "mine").glob("*-decide-*.json"):
        path.unlink()
    code, out, err = anytime("run", "mine.py", "--quiet", "--json", "--results", tmp_path / "r", cwd=ran)
    said = json.loads(out)
    assert (code, err) == (0, "") and said["exp"] == "mine" and {row["status"] for row in said["rows"]} == {"done"}
    assert anytime("run", "mine.py", "--quiet", cwd=ran) == (0, "", "")
    assert anytime("compare", "mine", tmp_path / "r", "--quiet", cwd=ran) == (0, "", "")


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "anytime", "clean-cache"]
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as gone:
        said = subprocess.run(command, cwd=tmp_path, stdout=gone, stderr=subprocess.PIPE, text=True, env=env)
    assert (said.returncode, said.stderr) == (1, "")


def test_the_table_can_be_made_without_torch(ran):
    code = "import sys; sys.modules['torch'] = None; from anytime.__main__ import main; sys.exit(main(['report', 'mine']))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ran, capture_output=True, env=env).returncode == 0


def test_an_override_is_another_experiment(ran, tmp_path):
    code, out, _ = anytime(
        "run", "mine.py", "--set", "recipe.epochs=2", "--set", "train_seeds=(0,)", "--results", tmp_path, cwd=ran
    )
    assert code == 0
    (folder,) = (tmp_path / "records").iterdir()
    assert folder.name.startswith("mine-")


def test_an_override_keeps_its_name_when_its_file_changes(tmp_path, monkeypatch):
    from anytime.find import experiment

    text = EXPERIMENT.format(data=SMALL).replace('name="mine"', 'name="changing"')
    names = []
    for body in (text, text.replace('question="', 'question="Again: ')):
        (tmp_path / "changing.py").write_text(body)
        monkeypatch.delitem(sys.modules, "changing", raising=False)
        names.append(
            [experiment(str(tmp_path / "changing.py"), sets).name for sets in (["train_seeds=(0,)"], ["train_seeds=(1,)"])]
        )
    assert names[0] == names[1] and len(set(names[0])) == 2


def test_jobs_give_the_same_rows(ran, tmp_path):
    assert anytime("run", "mine.py", "--jobs", 2, "--results", tmp_path, cwd=ran)[0] == 0
    assert (tmp_path / "tables" / "mine.csv").read_text().count("\n") == (
        ran / "results" / "tables" / "mine.csv"
    ).read_text().count("\n")


@pytest.mark.parametrize(
    "args, said",
    [
        (("run", "qat_branchinet"), "did you mean 'qat_branchynet'"),
        (("run", "nowhere/mine.py"), "no experiment file nowhere/mine.py"),
        (("run", "mine.py", "--set", "recipe.epoch=1"), "did you mean 'epochs'"),
        (("run", "mine.py", "--set", "recipe.epochs=many"), "must be int"),
        (("run", "mine.py", "--set", "recipe.optimizer=SDG"), "did you mean 'SGD'"),
        (("run", "mine.py", "--set", "recipe"), "say which field and which value"),
        (("run", "mine.py", "--set", "budgets=('a',)"), "must be tuple[float, ...]"),
        (("run", "mine.py", "--set", "budgets=(0,)"), "must all be above 0"),
        (("run", "mine.py", "--set", "backends=()"), "backends is empty"),
        (("run", "mine.py", "--set", "budgets=(0.5, 0.5)"), "budgets name 0.5 twice"),
        (("run", "mine.py", "--set", "train_seeds=(0, 0)"), "train_seeds name 0 twice"),
        (("run", "mine.py", "--set", "replay_samples=-1"), "replay_samples=-1: use 1 or more"),
        (("run", "mine.py", "--format", "xls"), "no such format"),
        (("run", "mine.py", "--jobs", "0"), "give 1 or more"),
        (("report", "myne"), "did you mean 'mine'"),
        (("list", "mine"), "mine.py lies here: say mine.py"),
    ],
    ids=lambda v: "" if isinstance(v, str) else " ".join(v[1:]),
)
def test_a_wrong_question(ran, args, said):
    wrong(anytime(*args, cwd=ran), 2, said)


def test_a_file_that_is_no_python_is_named_where_it_is_imported(tmp_path):
    (tmp_path / "my_blocks.py").write_text("x = 1\ny = 2\ndef f(:\n")
    (tmp_path / "mine.py").write_text("import os\nimport my_blocks\n")
    wrong(anytime("list", "mine.py", cwd=tmp_path), 2, "mine.py, line 2: SyntaxError: invalid syntax (my_blocks.py, line 3)")


@pytest.mark.parametrize(
    "text, said",
    [
        ("1 / 0", "line 1: ZeroDivisionError"),
        ("from anytime.models.branchynet import BLeNett", "cannot import name 'BLeNett'"),
        ("from anytime.boards.hosst import Host", "No module named"),
        ("this is no Python", "SyntaxError"),
        ("x = 1", "defines no EXPERIMENT"),
        (EXPERIMENT.format(data=SMALL).replace('"mine"', '"yours"'), "is called as its file"),
        (EXPERIMENT.format(data=SMALL).replace("PTQ()", "PTQ(weight_bits=1)"), ""),
    ],
    ids=["raises", "unknown model", "unknown board", "syntax", "empty", "misnamed", "one bit"],
)
def test_a_wrong_experiment_file(tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    answer = anytime("run", "mine.py", cwd=tmp_path)
    if said:
        wrong(answer, 2, said)
    else:  # a backend that cannot be is a row with its reason, and the rest is run
        assert answer[0] == 0 and "weight bits 1" in answer[2] and "FP32" in answer[1]


@pytest.mark.parametrize(
    "arrays, said",
    [
        (dict(y_train=np.zeros(600, int), y_test=np.zeros(60, int)), "one class"),
        (dict(x_train=np.full((600, 1, 28, 28), np.nan, np.float32)), "NaN"),
        (None, "missing"),
    ],
    ids=["one class", "NaN", "missing"],
)
def test_data_that_cannot_be_used(tmp_path, arrays, said):
    rng = np.random.default_rng(0)
    good = dict(
        x_train=rng.random((600, 1, 28, 28), np.float32), y_train=rng.integers(0, 3, 600),
        x_test=rng.random((60, 1, 28, 28), np.float32), y_test=rng.integers(0, 3, 60),
    )  # fmt: skip
    if arrays is not None:
        np.savez(tmp_path / "d.npz", **{**good, **arrays})
    (tmp_path / "mine.py").write_text(EXPERIMENT.format(data='Npz("d.npz", calib=50, tune=50, val=50, hold=50)'))
    wrong(anytime("run", "mine.py", cwd=tmp_path), 1, "d.npz" if said == "missing" else said)


def test_real_data_that_is_not_there(tmp_path):
    env = {"ANYTIME_DATA": str(tmp_path / "none")}
    wrong(anytime("run", "qat_branchynet", "--results", tmp_path / "r", cwd=ROOT, env=env), 1, "ANYTIME_DATA", "MNIST")


def test_tampered_data_is_refused(tmp_path):
    data = os.environ.get("ANYTIME_DATA")
    if not data:
        pytest.skip("ANYTIME_DATA names no folder with MNIST's files")
    shutil.copytree(Path(data) / "MNIST", tmp_path / "MNIST")
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    body = bytearray(file.read_bytes())
    body[1000] ^= 1
    file.write_bytes(body)
    env = {"ANYTIME_DATA": str(tmp_path)}
    args = ("run", "qat_branchynet", "--set", "suites.*.data.limit=2000", "--results", tmp_path / "r")
    wrong(anytime(*args, cwd=ROOT, env=env), 1, "train-images-idx3-ubyte", "not the published file")


def test_a_hurt_checkpoint_fails_its_cells_and_says_what_to_delete(ran, tmp_path):
    shutil.copytree(ran / "results" / "cache", tmp_path / "cache")
    for path in (tmp_path / "cache" / "trained").rglob("weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    shutil.rmtree(tmp_path / "cache" / "predictions")
    code, out, err = anytime("run", ran / "mine.py", "--results", tmp_path, cwd=ran)
    assert code == 1 and "Traceback" not in err and "not as they were written" in err and "fail" in out + err


def test_a_torn_record_is_said_and_made_again(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "r")
    victim = next(p for p in (tmp_path / "r" / "records" / "mine").glob("*-eval-*.json"))
    victim.write_text(victim.read_text()[:100])
    code, _, err = anytime("run", ran / "mine.py", "--results", tmp_path / "r", cwd=ran)
    assert code == 0 and f"{victim.name} cannot be read" in err and "1 facts to do" in err


def test_a_full_disk_is_said_at_once(ran, tmp_path):
    wrong(anytime("run", "mine.py", "--results", tmp_path, cwd=ran, limit=50_000), 1, "cannot write", "free space")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix == ".json" and not p.read_text().endswith("}")]


def test_no_permission_is_said_at_once(ran):
    wrong(anytime("run", "mine.py", "--results", "/dev/null/here", cwd=ran), 1, "cannot write", "/dev/null/here")


def test_debug_shows_the_traceback(ran):
    code, _, err = anytime("run", "mine.py", "--set", "recipe.epoch=1", "--debug", cwd=ran)
    assert code == 2 and "Traceback" in err


def test_export_writes_what_its_three_lines_run(ran, tmp_path):
    cell = ("export", "mine.py", "B-LeNet", "INT8 PTQ", "--policy", "Entropy")
    image = "import numpy as np; image = np.full((28, 28), 90, np.uint8); x = image[None, None].astype(np.float32)\n"
    said = []
    for more, to in (((), tmp_path / "net"), (("--single-file",), tmp_path / "net.onnx")):
        code, out, err = anytime(*cell, *more, "--to", to, cwd=ran)
        assert code == 0, err
        wrote, _, *lines = out.strip().splitlines()
        assert wrote.startswith(f"wrote {to}") and len(lines) == (5 if more else 3)
        done = "\nprint(net(image).exit)" if not more else "\nprint(exit[0])"
        block = "import sys; sys.modules['torch'] = None\n"
        ran_it = subprocess.run(
            [sys.executable, "-c", block + image + "\n".join(lines) + done], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert ran_it.returncode == 0, ran_it.stderr
        said.append(ran_it.stdout.split()[-1])
    assert set(said) <= {"0", "1"}


@pytest.mark.parametrize(
    "args, said",
    [
        (("mine.py", "B-LeNot"), "did you mean 'B-LeNet'"),
        (("",), "no network is named"),
        (("0123456789ab",), "no experiment has a network with the key"),
        (("0123456789ab",), "its path goes before the key"),
        (("myne", "B-LeNet"), "no experiment 'myne'"),
        (("mine.py", "B-LeNet", "FP32", "--policy", "Entropi"), "did you mean 'Entropy'"),
        (("mine.py", "B-LeNet", "FP32", "--single-file"), "is called NAME.onnx"),
    ],
    ids=lambda v: "" if isinstance(v, str) else " ".join(v[1:]),
)
def test_an_export_of_what_there_is_not(ran, tmp_path, args, said):
    wrong(anytime("export", *args, "--to", tmp_path / "net", cwd=ran), 2, said)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_trained(ran, tmp_path):
    cell = ("export", "mine.py", "B-LeNet", "INT8 PTQ", "--results", tmp_path / "new")
    for to, more, said in (
        ("", (), "give one with --to"),
        (ran, (), "holds other things"),
        ("net", ("--single-file",), "NAME.onnx"),
    ):
        code, _, err = answer = anytime(*cell, "--to", to, *more, cwd=ran)
        wrong(answer, 2, said)
        assert "train" not in err and not (tmp_path / "new").exists(), code


def test_a_policy_that_no_bundle_could_find_is_refused(ran):
    own = (ROOT / "README.md").read_text().partition("### Add a policy")[2].partition("```python")[2].partition("```")[0]
    text = own + EXPERIMENT.format(data=SMALL).replace('name="mine"', 'name="falls"').replace("(Entropy(),)", "(Falling(),)")
    (ran / "falls.py").write_text("from __future__ import annotations\n" + text)
    cell = ("export", "falls.py", "B-LeNet", "INT8 PTQ", "--policy", "Falling", "--to", "fallen")
    wrong(anytime(*cell, cwd=ran), 2, "Falling is not there: put its file there first")
    assert not (ran / "fallen").exists()


@pytest.mark.parametrize(
    "said, sentence",
    [("name=../../evil", "a name is of letters"), ("suites.*.data.noise=1e999", "data.noise=1e999: it must be float")],
)
def test_values_that_no_record_could_hold(ran, said, sentence):
    wrong(anytime("list", "mine.py", "--set", said, cwd=ran), 2, sentence)


def test_an_export_never_writes_over_other_things(ran):
    wrong(anytime("export", "mine.py", "B-LeNet", "FP32", "--to", ran, cwd=ran), 2, "holds other things than a bundle of ours")


@pytest.mark.parametrize(
    "said, argv",
    [
        (["FORCE=1", "ONLY=SDN ResNet-20 PTQ(8) it's"], ["--force", "--only", "SDN ResNet-20 PTQ(8) it's"]),
        (["FORCE=0", "QUIET=no", "JSON=false"], []),
        (["SET=arms=('refitted',) train_seeds=(0, 1)"], ["--set", "arms=('refitted',) train_seeds=(0, 1)"]),
    ],
)
def test_make_passes_on_what_was_said(said, argv):
    line = subprocess.run(["make", "-n", "exp", *said], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[
        -1
    ]
    words = shlex.split(line)
    assert [w for w in words if w in argv or w in ("--force", "--only", "--set", "--quiet", "--json")] == argv


def test_make_deletes_nothing_when_it_is_told_no():
    lines = [
        subprocess.run(["make", "-n", "clean-cache", f"YES={yes}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for yes in ("1", "0", "no", "")
    ]
    assert ["--yes" in line for line in lines] == [True, False, False, False]


def test_several_settings_in_one_word(ran):
    code, out, _ = anytime(
        "list", "mine.py", "--set", "train_seeds=(0, 1) arms=('refitted',)  recipe.epochs=3", "--json", cwd=ran
    )
    assert code == 0 and {fact["seed"] for fact in json.loads(out)["lines"]} == {"seed 0", "seed 1"}


def test_a_terminal_without_our_signs_gets_question_marks(ran):
    code, out, error = anytime("report", "mine", cwd=ran, env={"PYTHONIOENCODING": "ascii"})
    assert code == 0 and "?" in out and "Traceback" not in error


def test_an_experiment_s_path_may_hold_spaces(tmp_path, capsys):
    (tmp_path / "my files").mkdir()
    path = tmp_path / "my files" / "mine.py"
    path.write_text("raise ValueError('read')\n")
    assert main(["export", str(path), "FP32", "--to", str(tmp_path / "out")]) == 2
    assert "ValueError: read; mend the experiment file" in capsys.readouterr().err

"""``prodigy_fused.install()`` and ``python -m prodigy_fused run``: scripts that name prodigyopt, unchanged."""

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
from processes import ROOT

import prodigy_fused
from prodigy_fused import Prodigy
from prodigy_fused.__main__ import main
from prodigy_fused.run import run

STAND_IN = ROOT / "prodigy_fused" / "stand_in"
# How trainers come by the class, each as a function of what its user chose.
WAYS = {
    # diffusers, examples/dreambooth/train_dreambooth_lora_sdxl.py and its like; sd-scripts, library/train_util.py;
    # without the exception OneTrainer, modules/util/create.py
    "import in a function": """
        try:
            import prodigyopt
        except ImportError:
            raise ImportError("To use Prodigy, please install the prodigyopt library: `pip install prodigyopt`")
        found = prodigyopt.Prodigy""",
    # sd-scripts' --optimizer_type=prodigyopt.Prodigy
    "a dotted name": """
        import importlib
        *module, name = "prodigyopt.Prodigy".split(".")
        found = getattr(importlib.import_module(".".join(module)), name)""",
    # ai-toolkit, toolkit/optimizer.py
    "from": """
        from prodigyopt import Prodigy as found""",
    # the module of the class, as pickle and type hints name it
    "from the module": """
        from prodigyopt.prodigy import Prodigy as found""",
    # a module that has it in its own namespace
    "import as": """
        import prodigyopt as package
        found = package.Prodigy""",
    # trainers that look before they import
    "find_spec": """
        import importlib.util
        if importlib.util.find_spec("prodigyopt") is None:
            raise ImportError("Please install Prodigy: pip install prodigyopt")
        from prodigyopt import Prodigy as found""",
    # records of an environment
    "version": """
        import importlib.metadata
        assert importlib.metadata.version("prodigyopt").startswith("1.1.2")
        from prodigyopt import *
        found = Prodigy""",
}


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process as python starts it in an empty folder, with prodigyopt not imported yet; restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["python -m"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("PYTHONPATH", "")
    before = dict(sys.modules)
    forget = [name for name in before if name.partition(".")[0] == "prodigyopt"]
    for name in forget:
        del sys.modules[name]
    yield tmp_path
    prodigy_fused.uninstall()
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update({name: before[name] for name in ["__main__", "__mp_main__", *forget]})


@pytest.fixture
def prodigyopt(fresh):
    """prodigyopt, imported before anything is installed."""
    return pytest.importorskip("prodigyopt")


def written(name, code):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code).lstrip())
    return str(path)


# -- install -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_importing(fresh, way):
    prodigy_fused.install()
    names = {}
    exec(textwrap.dedent(WAYS[way]), names)
    assert names["found"] is Prodigy


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_importing_again(prodigyopt, way):
    """Where prodigyopt was imported before, but no name of it is in use."""
    prodigy_fused.install()
    names = {}
    exec(textwrap.dedent(WAYS[way]), names)
    assert names["found"] is Prodigy is prodigyopt.Prodigy


def test_the_module_says_whose_it_is(fresh):
    prodigy_fused.install()
    module = importlib.import_module("prodigyopt")
    assert "prodigy_fused" in module.__doc__ and "prodigy" in module.__version__
    assert module.__spec__ is importlib.util.find_spec("prodigyopt")
    assert Path(module.__spec__.origin) == Path(module.__file__) == STAND_IN / "package" / "prodigyopt" / "__init__.py"


def test_a_second_install_does_nothing(fresh):
    prodigy_fused.install()
    path, module = list(sys.path), sys.modules["prodigyopt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prodigy_fused.install()
    assert sys.path == path and sys.modules["prodigyopt"] is module
    assert sys.path[0] == str(fresh), "scripts rely on the first entry"


def test_uninstall(fresh):
    before = list(sys.path)
    for _ in range(2):
        prodigy_fused.install()
        prodigy_fused.uninstall()
        assert sys.path == before
        assert not [name for name in sys.modules if name.startswith("prodigyopt")]
    assert pytest.importorskip("prodigyopt").Prodigy is not Prodigy


def test_uninstall_gives_an_imported_module_its_own_class_back(prodigyopt):
    theirs = prodigyopt.Prodigy
    prodigy_fused.install()
    prodigy_fused.uninstall()
    assert prodigyopt.Prodigy is prodigyopt.prodigy.Prodigy is theirs is not Prodigy
    assert sys.modules["prodigyopt"] is prodigyopt


def test_names_imported_before_stay_and_are_told(prodigyopt):
    theirs = prodigyopt.Prodigy
    user = type(sys)("user_of_it")
    exec("from prodigyopt import Prodigy\nclass Own(Prodigy): pass", vars(user))
    sys.modules["user_of_it"] = user
    with pytest.warns(UserWarning, match=r"before prodigy_fused.install\(\): user_of_it, user_of_it.Own. Call") as told:
        prodigy_fused.install()
    assert told[0].filename == __file__
    assert user.Prodigy is theirs and prodigyopt.Prodigy is Prodigy


def test_the_rest_of_prodigyopt_is_its_own(fresh):
    spec = importlib.util.find_spec("prodigyopt")
    if spec is None:
        pytest.skip("prodigyopt is not installed")
    prodigy_fused.install()
    module = importlib.import_module("prodigyopt.prodigy_reference")
    assert Path(module.__file__).parent == Path(spec.origin).parent


# -- run ---------------------------------------------------------------------------------------------------------------

FACTS = """
    import sys
    import prodigyopt
    facts = dict(globals())
    facts.update(argv=list(sys.argv), path=sys.path[0], ours=prodigyopt.Prodigy.__module__)
    """


def facts():
    return sys.modules["__main__"].facts


@pytest.mark.parametrize("where", ["script.py", "sub/script.py", "link.py"])
def test_a_script_sees_what_python_gives_it(fresh, where):
    script = written(where.replace("link.py", "sub/script.py"), FACTS)
    if where == "link.py":
        os.symlink(script, where)
    run([where, "-m", "--lr", "1"])
    assert facts()["ours"] == "prodigy_fused.prodigy"
    assert facts()["argv"] == [where, "-m", "--lr", "1"]
    assert facts()["path"] == str(Path(script).resolve().parent), "that of the file itself"
    assert facts()["__file__"] == str(fresh / where)
    assert facts()["__name__"] == "__main__"
    assert facts()["__spec__"] is None is facts()["__package__"]


def test_the_stand_in_is_handed_down(fresh, monkeypatch):
    script = written("script.py", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["here", "there"]))
    for _ in range(2):
        run([script])
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(STAND_IN / "package"), "here", "there"]


@pytest.mark.parametrize(("name", "file"), [("pack.mod", "mod.py"), ("pack", "__main__.py")])
def test_a_module_sees_what_python_gives_it(fresh, name, file):
    written("pack/__init__.py", "")
    path = written(f"pack/{file}", FACTS)
    run(["-m", name, "run", "-m"])
    assert facts()["ours"] == "prodigy_fused.prodigy"
    assert facts()["argv"] == [str(fresh / path), "run", "-m"]
    assert facts()["path"] == str(fresh)
    assert facts()["__file__"] == str(fresh / path)
    assert facts()["__name__"] == "__main__" and facts()["__package__"] == "pack"
    assert facts()["__spec__"].name == f"pack.{file.removesuffix('.py')}"


def test_a_folder_is_run_as_python_runs_it(fresh, capsys):
    written("app/__main__.py", "import sys, helper; print(__name__, helper.WHERE, sys.argv)")
    written("app/helper.py", "import prodigyopt; WHERE = prodigyopt.Prodigy.__module__")
    run(["app", "x"])
    assert capsys.readouterr().out == "__main__ prodigy_fused.prodigy ['app', 'x']\n"


@pytest.mark.parametrize("code", [0, 3, "None", "'a text'"])
def test_the_exit_code_is_the_scripts(fresh, code):
    with pytest.raises(SystemExit) as left:
        run([written("script.py", f"import sys; sys.exit({code})")])
    assert left.value.code == eval(str(code))


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "nothing": (["run"], "no script given"),
        "no file": (["run", "absent.py", "--lr", "1"], "there is no file absent.py"),
        "an option": (["run", "-c", "print(1)"], "-c is neither a script nor -m"),
        "no name": (["run", "-m"], "no module given"),
        "no module": (["run", "-m", "absent"], "there is no module absent"),
        "not in a package": (["run", "-m", "email.absent"], "there is no module email.absent"),
        "in no package": (["run", "-m", "absent.absent"], "there is no module absent"),
        "a package that cannot be run": (["run", "-m", "email"], "there is no module email"),
        "no command": (["train"], "unknown command train"),
    }.values(),
)
def test_what_cannot_be_run(fresh, capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "--help"], ["run", "-h"]])
def test_help(capsys, arguments):
    main(arguments)
    assert "run -m module" in capsys.readouterr().out


FAILING = {
    "an error": "def f():\n    raise ValueError('no')\n\nf()\n",
    "its cause": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('no') from error\n",
    "no python": "x = = 1\n",
}


@pytest.mark.parametrize("name", FAILING)
def test_the_traceback_is_pythons(fresh, capfd, name):
    script = written("script.py", FAILING[name])
    plain = subprocess.run([sys.executable, script], capture_output=True, text=True)
    sys.excepthook = sys.__excepthook__
    with pytest.raises((ValueError, SyntaxError)) as caught:
        run([script])
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert capfd.readouterr().err == plain.stderr


def test_an_error_elsewhere_is_shown_whole(fresh, capfd):
    """As in a thread's own hook, or in an interactive session after the script."""
    run([written("script.py", "")])
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert "test_an_error_elsewhere_is_shown_whole" in capfd.readouterr().err


# -- processes of their own --------------------------------------------------------------------------------------------

ALL_WAYS = "".join(f"\n# {way}{code}\n        seen.append(found)" for way, code in WAYS.items())
TRAINER = f"""
import multiprocessing, sys
from importlib.metadata import version
class Count(int):
    "Of the script's own, to be sent back."
def trained(queue=None):
    seen = []
    if True:
        {ALL_WAYS.strip().replace("from prodigyopt import *", "import prodigyopt; Prodigy = prodigyopt.Prodigy")}
    modules = {{cls.__module__ for cls in seen}}
    queue.put((Count(len(seen)), modules)) if queue else print(len(seen), modules)
if __name__ == "__main__":
    trained()
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=trained, args=(queue,))
    child.start()
    print(*queue.get(), version("prodigyopt"))
    child.join()
    sys.exit(child.exitcode or "the end")
"""


def python_in(folder, *command, **environment):
    """Runs python with this source tree in its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_where_prodigyopt_is_not_installed(tmp_path):
    """In the script, and in what multiprocessing spawns; the rest of the environment is as it is."""
    site = tmp_path / "site"
    site.mkdir()
    folders = [Path(folder) for folder in sys.path if "site-packages" in folder]
    for name, entry in {path.name: path for folder in reversed(folders) for path in folder.iterdir()}.items():
        if not name.startswith("prodigyopt"):
            (site / name).symlink_to(entry)
    (tmp_path / "train.py").write_text(TRAINER)
    command = ["-S", "-m", "prodigy_fused", "run", "train.py"]
    done = python_in(tmp_path, *command, PYTHONPATH=os.pathsep.join([str(ROOT), str(site)]))
    all_ours = f"{len(WAYS)} {{'prodigy_fused.prodigy'}}"
    assert done.stdout.splitlines() == [all_ours, f"{all_ours} 1.1.2+prodigy.fused"], done.stderr
    assert done.returncode == 1 and done.stderr == "the end\n"


@pytest.mark.parametrize("installed", [True, False])
def test_an_environment_without_us_has_its_own_prodigyopt(tmp_path, installed):
    """As of another python that the script starts, and that inherits PYTHONPATH."""
    (tmp_path / "site").mkdir()
    if installed:
        (tmp_path / "site" / "prodigyopt").mkdir()
        (tmp_path / "site" / "prodigyopt" / "__init__.py").write_text("from .prodigy import Prodigy")
        (tmp_path / "site" / "prodigyopt" / "prodigy.py").write_text("class Prodigy: pass")
    code = "import prodigyopt.prodigy as p; print(p.__file__, p.Prodigy)\nfrom prodigyopt import Prodigy"
    path = os.pathsep.join([str(STAND_IN / "package"), str(tmp_path / "site")])
    done = python_in(tmp_path, "-S", "-c", code, PYTHONPATH=path)
    if installed:
        assert done.stdout.startswith(str(tmp_path)), done.stderr
    else:
        assert done.stderr.endswith("ModuleNotFoundError: No module named 'prodigyopt'\n")


def test_a_checkout_that_is_not_installed(tmp_path):
    """Only the folder in which python was started leads to the package; the script and its children find it."""
    code = "import prodigy_fused, os; print(prodigy_fused.__file__, os.environ['PYTHONPATH'].count(os.pathsep))"
    (tmp_path / "train.py").write_text(code)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "prodigy_fused").symlink_to(ROOT / "prodigy_fused")
    done = python_in(checkout, "-c", NOT_INSTALLED, str(tmp_path / "train.py"), PYTHONPATH="")
    assert done.stdout.split() == [str(checkout / "prodigy_fused" / "__init__.py"), "1"], done.stderr


NOT_INSTALLED = """
import os, runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path[0] = os.getcwd()  # as -m does
sys.argv[:] = ["", "run", sys.argv[1]]
runpy.run_module("prodigy_fused", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher_first", [True, False], ids=["torchrun -m prodigy_fused", "run -m torchrun"])
def test_torchrun(tmp_path, launcher_first):
    (tmp_path / "train.py").write_text(
        "import os, sys, prodigyopt; print(os.environ['RANK'], sys.argv, prodigyopt.Prodigy.__module__)"
    )
    torchrun, ours = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ["-m", "prodigy_fused", "run"],
    )
    command = torchrun + ours if launcher_first else ours + torchrun
    done = python_in(tmp_path, *command, "train.py", "--lr", "1")
    seen = [line for line in done.stdout.splitlines() if "train.py" in line]
    assert sorted(seen) == [f"{rank} ['train.py', '--lr', '1'] prodigy_fused.prodigy" for rank in (0, 1)], done.stderr
    assert done.returncode == 0

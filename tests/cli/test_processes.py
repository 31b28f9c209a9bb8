"""What only a real process shows: taken ports, missing packages, Ctrl-C, a quick start, a broken pipe."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli.command_line import fedllm, files, process
from cli.conftest import Scene
from patience import PATIENCE_S

KEPT = {"coordinator.lock"}
"""An empty file that outlives the coordinator on purpose: it is what two coordinators on one home meet at."""


@contextmanager
def taken_port() -> Iterator[int]:
    """Hold a loopback port as another program would."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def test_a_taken_control_port(scene: Scene) -> None:
    """`coordinator start` names address and flag, and leaves its folder as it was."""
    before = files(scene.home)
    with taken_port() as port:
        said = process("coordinator", "start", "--home", scene.home, "--port", port)
    said.fails(1, "port-busy", f"127.0.0.1:{port}", "--port")
    assert {k: v for k, v in files(scene.home).items() if k not in KEPT} == before


def test_a_taken_flower_port(scene: Scene) -> None:
    """A SuperLink that cannot listen is found before anything of Flower is started."""
    with taken_port() as port, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        control = free.getsockname()[1]
        free.close()
        said = process("coordinator", "start", "--home", scene.home, "--port", control, "--flower-port", port)
    said.fails(1, "port-busy", str(port), "flower_port")


def _serve(scene: Scene, *more: object) -> tuple[object, ...]:
    key = "ed25519:" + "0" * 64
    registry = scene.root / "registry"
    common = ("--base", scene.base, "--registry", registry, "--coordinator-key", key, "--tenants", scene.tenants)
    return ("serve", *common, *more)


def test_a_taken_endpoint_port(scene: Scene) -> None:
    """`serve` finds the port taken before it loads a model."""
    before = files(scene.root)
    with taken_port() as port:
        said = process(*_serve(scene, "--port", port))
    assert said.exit_code == 1
    assert said.out == ""
    assert "error[port-busy]: " in said.err
    assert str(port) in said.err
    assert "--port" in said.err
    assert files(scene.root) == before


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("uvicorn", "serve", _serve),
        ("torch", "serve", _serve),
        ("sqlalchemy", "coordinator", lambda s: ("coordinator", "start", "--home", s.home)),
        ("fastapi", "coordinator", lambda s: ("coordinator", "start", "--home", s.home, "--port", 0)),
        ("tokenizers", "client", lambda s: ("client", "check", "--home", s.owner("east"))),
        ("grpc", "client", lambda s: ("client", "start", "--home", s.owner("east"))),
        ("dp_accounting", "client", lambda s: ("privacy", "calibrate", "--epsilon", 8, "--steps", 3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_package_names_the_extra(scene: Scene, module: str, extra: str, arguments: object) -> None:
    """The error says which package, and the pip command that brings it for this very program."""
    hidden = f"import sys; sys.modules[{module!r}] = None"
    said = process(*arguments(scene), first=hidden)  # type: ignore[operator]
    assert said.exit_code == 2, said
    assert said.out == ""
    assert f"error[extra-missing]: this needs the package '{module}'" in said.err
    assert f"pip install 'fedllm[{extra}]'" in said.err
    assert "Traceback" not in said.err


def test_an_owner_with_a_readable_key_does_not_start(scene: Scene) -> None:
    """The daemon refuses a key that others can read, exit 4."""
    (scene.owner("east") / "owner.pem").chmod(0o644)
    said = process("client", "start", "--home", scene.owner("east"))
    said.fails(4, "authentication", "chmod 600")


def test_an_owner_whose_roster_pins_another_key_does_not_start(scene: Scene) -> None:
    """The daemon's own key must be the one that its approved roster names, exit 4."""
    (scene.owner("east") / "owner.pem").unlink()
    fedllm("client", "key", "--home", scene.owner("east"))
    said = process("client", "start", "--home", scene.owner("east"))
    assert said.exit_code == 4, said
    assert "error[authentication]: the key held here is not the one" in said.err


def test_ctrl_c_exits_130_and_says_nothing_ugly(scene: Scene) -> None:
    """SIGINT in the middle of a command: exit 130, no traceback."""
    waiting = (
        # whoever runs the tests in the background of a shell has SIGINT ignored, and children inherit that
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import time, fedllm.cli.context as c, sys\n"
        "def wait(*a, **k):\n    print('waiting', file=sys.stderr, flush=True); time.sleep(100)\n"
        "c.ControlApi.call = wait\nfrom fedllm.cli import main\nmain()"
    )
    command = [sys.executable, "-c", waiting, "round", "list", "--home", str(scene.home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "waiting\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=PATIENCE_S)
    assert (child.returncode, out, err) == (130, "", "")


def test_version_takes_less_than_a_second_of_processor_time(tmp_path: Path) -> None:
    """The command line loads no heavy package to say who it is."""
    before = os.times()
    said = process("version")
    after = os.times()
    spent_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert said.exit_code == 0
    assert said.err == ""
    assert spent_s < 1.0


def test_a_closed_pipe_is_not_an_error_message(scene: Scene) -> None:
    """`fedllm client policy show | true` prints no traceback."""
    command = f"{sys.executable} -m fedllm client policy show --home {scene.owner('east')} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert "Traceback" not in done.stderr, done.stderr

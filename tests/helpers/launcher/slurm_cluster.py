"""A Slurm cluster of two nodes on this machine: munge, slurmctld and two slurmd from Debian's packages."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CONFIG = """
ClusterName=x
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no Slurm here, "" if there can."""
    if sys.platform != "linux" or os.geteuid():
        return "a Slurm cluster of one's own needs root on Linux"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "srun") if not shutil.which(name)]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm)" if absent else ""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in found]


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons, and end them; gives the environment in which ``srun`` finds them."""
    host = socket.gethostname()
    config, munge = folder / "slurm.conf", folder / "munge"
    config.write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(3)))
    munge.mkdir(mode=0o755)
    (folder / "state").mkdir()
    key = munge / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    env = {**os.environ, "SLURM_CONF": str(config)}
    quiet = {"env": env, "stdin": subprocess.DEVNULL, "stdout": (folder / "out").open("w"), "stderr": subprocess.STDOUT}
    files = {"key": key, "socket": munge / "socket", "pid": munge / "pid", "log": munge / "log", "seed": munge / "seed"}
    options = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
    commands = [["munged", "--force", "--foreground", *options], ["slurmctld", "-D", "-f", str(config)]]
    commands += [["slurmd", "-D", "-f", str(config), "-N", name] for name in ("n1", "n2")]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            daemons.append(subprocess.Popen(command, **quiet))  # type: ignore[call-overload]
            time.sleep(0.5 if command[0] == "munged" else 0.1)
        end = time.monotonic() + 30
        while True:
            state = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=env, capture_output=True, text=True)
            if "idle 2" in state.stdout:
                break
            if time.monotonic() > end:
                raise RuntimeError(
                    f"Slurm did not start: {state.stdout} {state.stderr} {(folder / 'out').read_text()[-2000:]}"
                )
            time.sleep(0.2)
        yield env
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True)
        time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()

"""What is checked on all machines before a run starts, which is also the quick half of ``doctor``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from xdit_core.errors import UsageError
from xdit_launcher.cluster import host_facts
from xdit_launcher.cluster.protocol import UNREADABLE

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.cluster.fleet import Fleet


def check_hosts(fleet: Fleet, plan: Plan | None) -> tuple[dict[int, Any], list[str]]:
    """Ask all hosts what they are, and compare them with this machine.

    Args:
        plan: of the run, which is then checked as well; None to look at the machines only.

    Returns:
        The facts of each host that answered (see `host_facts.about`), by its number, and a sentence for each problem.
    """
    distributions, modules = host_facts.origins(plan)
    model = plan.folder if plan else ""
    local = host_facts.about(distributions, modules, model)
    answers, problems = fleet.ask(
        "hello",
        kind=dict,
        distributions=distributions,
        modules=modules,
        plan=plan.to_json() if plan else "",
        folder=os.getcwd(),
    )
    unreadable = [i for i, remote in answers.items() if not host_facts.alike(remote, local)]
    problems += [f"{fleet.hosts[i].name}: {UNREADABLE}" for i in unreadable]
    facts = {i: remote for i, remote in answers.items() if i not in unreadable}
    problems += host_facts.same_machine(facts, {i: fleet.hosts[i].name for i in facts}) if fleet.typed else ()
    for i, remote in sorted(facts.items()):
        problems += host_facts.differences(remote, local, fleet.hosts[i].name)
        problems.append(host_facts.model_problem(remote, local, fleet.hosts[i].name, model))
        problems += gpu_problems(fleet, i, remote, plan)
    return facts, [problem for problem in problems if problem]


def gpu_problems(fleet: Fleet, number: int, facts: Mapping[str, Any], plan: Plan | None) -> list[str]:
    """Sentences about the GPUs of one host."""
    host, gpus, device = fleet.hosts[number], len(facts["gpus"]), plan.device if plan else None
    problems = [host_facts.device_problem(plan, bool(gpus), f"{host.name} has {gpus}") if plan else ""]
    if device == "cuda" and not gpus:
        problems.append(f"{host.name} has no GPU that its driver shows; leave it out, or use device=cpu.")
    elif gpus and device != "cpu" and (host.slots or 0) > gpus:
        problems.append(f"{host.name} has {gpus} GPUs and {host.slots} slots; lower its slots.")
    return problems


def variables_to_pass(patterns: Sequence[str]) -> dict[str, str]:
    """Variables of this environment that the ranks get.

    Args:
        patterns: names; ``NCCL_*`` stands for all that begin so.

    Raises:
        UsageError: one that is named is not set here.
    """
    for name in patterns:
        if "*" not in name and name not in os.environ:
            raise UsageError(
                f"the variable {name} is to be passed on but is not set here; set it, or leave it out of env=."
            )
    return {k: v for k, v in os.environ.items() if any(fnmatch(k, pattern) for pattern in patterns)}

"""Submissions that could never start, on a site that takes them all: refused by key, and how soon. `make drills`."""

import json
import time

import drill_site
import pytest
from drill_site import DrillSite

pytestmark = pytest.mark.cluster
site = drill_site.site
KIND = ("--stock", "--accounting")
IMPOSSIBLE = [
    ({"nodes": 4}, "nodes"),
    ({"cpus_per_task": 17}, "cpus_per_task"),
    ({"mem_mb": 200_001}, "mem_mb"),
    ({"gres": "gpu:9"}, "gres"),
    ({"gres": "gpu:a100:1"}, "gres"),
    ({"slurm_partition": "nowhere"}, "slurm_partition"),
    ({"slurm_partition": "closed"}, "slurm_partition"),
    ({"slurm_partition": "short", "runtime": 11}, "runtime"),
    ({"runtime": "1-01:00:00"}, "runtime"),
    ({"constraint": "a100"}, "constraint"),
    ({"qos": "urgent"}, "qos"),
    ({"slurm_account": "funded"}, "slurm_account"),
    ({"slurm_extra": "--reservation=nobodys"}, "reservation"),
    ({"slurm_extra": "--exclude=node[1-2]"}, "exclude"),
    ({"slurm_extra": "--exclude=gpu-n"}, "exclude"),
    ({"slurm_extra": "--qos=urgent"}, "slurm_extra"),  # which the plugin does not take; `qos` is the fix
]


def test_what_could_never_start_is_refused_by_key(site: DrillSite) -> None:
    site.plan(steps=20)
    wrong = []
    for resources, key in IMPOSSIBLE:
        site.profile(**resources)
        begin = time.monotonic()
        start = site.start()
        code = start.end(120)
        figures = {"refused": resources, "key": key, "seconds": round(time.monotonic() - begin, 1)}
        with open(drill_site.FIGURES, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")
        if code == 0 or f"train: {key}" not in start.text() or site.jobs():
            wrong.append((resources, code, start.text()[-1500:]))
            site.clean()
    site.profile()
    assert not wrong

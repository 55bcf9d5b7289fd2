"""The scripts for clusters: what they would run, and what they do when machines are taken away."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"


@pytest.fixture
def branched(xelm, initialised, tiny, tmp_path):
    shutil.copytree(initialised[0], tmp_path / "RUN")
    xelm("branch", tmp_path / "RUN", "--clusters", tiny.clusters)
    return tmp_path / "RUN"


@pytest.fixture
def run(tmp_path):
    """A function that runs a script where the given programs are what these lines of shell say;
    its exit code, what it said, and the calls of those programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    calls = tmp_path / "calls"
    calls.touch()

    def script(name, *arguments, environment=None, **fakes):
        xelm = f'exec "{sys.executable}" -m xelm "$@"'
        for program, lines in {"xelm": xelm, "sleep": "", **fakes}.items():
            path = programs / program
            note = "" if program == "xelm" else f'echo "{program} $*" >> "{calls}"\n'
            path.write_text(f"#!/usr/bin/env bash\n{note}{lines}\n")
            path.chmod(0o755)
        found = {**os.environ, **(environment or {}), "PATH": f"{programs}:{os.environ['PATH']}"}
        command = ["bash", str(SCRIPTS / name), *map(str, arguments)]
        done = subprocess.run(command, env=found, capture_output=True, text=True, timeout=60)
        return done, calls.read_text().splitlines()

    return script


def test_a_slurm_job_for_each_expert(run, branched):
    done, _ = run("slurm.sh", "--dry-run", branched, "--gres=gpu:1")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[0] == "sbatch" and "--array=0-1" in words and "--signal=TERM@120" in words
    assert words[-2:] == ["--gres=gpu:1", str(SCRIPTS / "slurm.sh")]


def test_nothing_is_submitted_for_a_run_that_cannot_be_read(run, tmp_path):
    done, calls = run("slurm.sh", tmp_path, sbatch="")
    assert done.returncode == 2 and "is no RUN" in done.stderr and calls == []


def test_nothing_is_submitted_where_nothing_is_left(run, tiny):
    done, calls = run("slurm.sh", tiny.directory, sbatch="")
    assert done.returncode == 0 and "every expert" in done.stderr
    assert not any(call.startswith("sbatch") for call in calls)


JOB = {
    "XELM_RUN": "/runs/my family",
    "XELM_NAMES": "de-fr en-es",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_ARRAY_JOB_ID": "77",
}


@pytest.mark.parametrize(
    ("tasks", "code", "ended", "more"),
    [("1", 0, 0, []), ("8", 2, 2, []), ("1", 75, 0, ["scontrol requeue 77_1"])],
)
def test_a_slurm_job_that_was_asked_to_end_is_queued_again(run, tasks, code, ended, more):
    environment = {**JOB, "SLURM_NTASKS": tasks}
    done, calls = run("slurm.sh", environment=environment, srun=f"exit {code}", scontrol="")
    assert done.returncode == ended
    together = " --hosts" if tasks == "8" else ""
    assert calls == [f"srun xelm train /runs/my family en-es{together}", *more]


def test_trainings_of_a_cluster_are_told_the_settings(run):
    settings = {"XELM_SETTINGS": "experts.runtime.mesh_fsdp=4 experts.runtime.dtype=bfloat16"}
    told = "--set experts.runtime.mesh_fsdp=4 --set experts.runtime.dtype=bfloat16"
    _, calls = run("slurm.sh", environment=JOB | settings, srun="")
    assert calls == [f"srun xelm train /runs/my family en-es {told}"]
    words = ("--dry-run", "/runs/family", "uralic", "europe-west4-b")
    done, _ = run("pod.sh", *words, environment=settings)
    trained = done.stdout.splitlines()[-1].replace("\\", "")
    assert f"xelm train /runs/family uralic {told} --hosts" in trained


def test_a_pod_slice_is_asked_for_set_up_and_trained_on(run):
    done, calls = run("pod.sh", "--dry-run", "/runs/family", "uralic", "europe-west4-b")
    assert done.returncode == 0, done.stderr
    assert calls == []
    created, prepared, trained = done.stdout.splitlines()
    assert "queued-resources create xelm-uralic-" in created and created.endswith("--spot ")
    assert "--accelerator-type=v5litepod-16" in created
    assert "--worker=all" in prepared and "xelm" in prepared
    assert "xelm\\ train\\ /runs/family\\ uralic\\ --hosts" in trained
    assert "to delete it: gcloud compute tpus queued-resources delete xelm-uralic-" in done.stderr


GCLOUD = """
case "$*" in
  *describe*"-1 "*) [[ -e gone ]] && echo SUSPENDED || echo ACTIVE ;;
  *describe*) echo ACTIVE ;;
  *ssh*"-1 "*train*) touch gone; exit 255 ;;
esac
"""


@pytest.mark.parametrize("options", [[], ["--delete"]])
def test_a_spot_slice_that_is_taken_away_is_asked_for_again(run, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    done, calls = run("pod.sh", *options, "/runs/family", "uralic", "zone", gcloud=GCLOUD)
    assert done.returncode == 0, done.stderr
    kinds = ("create", "ssh", "delete")
    found = [kind for call in calls for kind in kinds if f" {kind} " in call]
    assert found == ["create", "ssh", "ssh"] * 2 + ["delete"] * 2 * len(options)
    names = [call.split(" create ")[1].split()[0] for call in calls if " create " in call]
    assert names[0].endswith("-1") and names[1].endswith("-2")


def test_a_training_that_fails_on_a_healthy_slice_is_not_tried_again(run):
    done, calls = run(
        *("pod.sh", "/runs/family", "uralic", "zone"),
        gcloud='case "$*" in *describe*) echo ACTIVE ;; *train*) exit 2 ;; esac',
    )
    assert done.returncode == 2
    assert sum(" create " in call for call in calls) == 1


def test_a_connection_that_breaks_is_no_reason_for_another_slice(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    breaks = """
case "$*" in
  *describe*) echo ACTIVE ;;
  *train*) [[ -e once ]] || { touch once; exit 255; } ;;
esac
"""
    done, calls = run("pod.sh", "/runs/family", "uralic", "zone", gcloud=breaks)
    assert done.returncode == 0, done.stderr
    assert sum(" create " in call for call in calls) == 1
    assert sum("xelm train" in call for call in calls) == 2


def test_a_setup_that_fails_makes_no_more_slices(run):
    fails = 'case "$*" in *describe*) echo ACTIVE ;; *install*) exit 1 ;; esac'
    done, calls = run("pod.sh", "--delete", "/runs/family", "uralic", "zone", gcloud=fails)
    assert done.returncode == 1
    assert sum(" create " in call for call in calls) == 1
    assert not any(" delete " in call for call in calls) and "to delete it" in done.stderr


def test_a_sky_job_for_each_expert(run, branched):
    options = ("--dry-run", "gs://my-runs", "RUN", "--gpus", "A100:1")
    environment = {"XELM_MOUNT": str(branched.parent)}
    done, _ = run("sky.sh", *options, environment=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("de-fr", "en-es")):
        assert line.startswith("sky jobs launch --yes") and f"XELM_NAME={name}" in line
        assert "--gpus A100:1" in line and line.rstrip().endswith("sky.yaml")
    task = yaml.safe_load((SCRIPTS / "sky.yaml").read_text())
    assert task["resources"]["use_spot"] and set(task["envs"]) == {
        *("XELM_RUN", "XELM_NAME", "XELM_BUCKET")
    }


def test_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted(map(str, SCRIPTS.glob("*.sh")))
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert len(scripts) == 3 and done.returncode == 0, done.stdout

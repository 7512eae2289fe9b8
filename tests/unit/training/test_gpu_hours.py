"""Promises of where a run's GPU hours went: every second in one place, also of steps no longer in its metrics."""

import json
import os

import pytest

from deepseek_sft.report import slurm_jobs, status
from deepseek_sft.training import gpu_hours, run_folder

HOUR = 3600


class Story:
    """A run that is written as training writes it, at times of our own."""

    def __init__(self, folder):
        self.folder, self.now = folder, 1_000_000.0
        self.metrics = folder / run_folder.METRICS

    def start(self, ranks, resumed, start_up):
        """A start from step ``resumed`` whose first step begins after ``start_up`` seconds."""
        before = gpu_hours.left_behind(self.folder, resumed)
        run_folder.cut_metrics(self.folder, resumed)
        began, self.now = self.now, self.now + start_up
        gpu_hours.note_start(self.folder, f"{ranks}", ranks, began, self.now, resumed, before)

    def steps(self, first, last, seconds=100.0, save=None, save_after=()):
        saved = 0.0
        for step in range(first, last + 1):
            self.now += seconds
            with open(self.metrics, "a") as stream:
                stream.write(json.dumps({"step": step, "seconds": seconds, "seconds_save": saved}) + "\n")
            os.utime(self.metrics, (self.now, self.now))
            saved = 0.0
            if step in save_after:
                self.now, saved = self.now + save, save
                folder = self.folder / f"step_{step}"
                folder.mkdir()
                (folder / "committed.json").write_text("{}")
                os.utime(folder / "committed.json", (self.now, self.now))

    @property
    def hours(self):
        return gpu_hours.read(self.folder)


@pytest.fixture
def story(tmp_path):
    return Story(tmp_path)


def test_an_unbroken_run_has_trained_saved_and_started(story):
    story.start(8, 0, 300)
    story.steps(1, 10, save=50, save_after=(5,))
    found = story.hours
    assert found.trained == pytest.approx(8 * 1000 / HOUR) and found.saved == pytest.approx(8 * 50 / HOUR)
    assert found.starting == pytest.approx(8 * 300 / HOUR) and (found.again, found.waiting) == (0, 0)
    assert found.share_trained == pytest.approx(1000 / 1350)


def test_what_a_step_was_slowed_by_a_checkpoint_beside_it_went_into_saving(story):
    story.start(8, 0, 300)
    story.steps(1, 10)
    lines = [json.loads(line) for line in story.metrics.read_text().splitlines()]
    lines[5] |= {"seconds": 107.0, "seconds_save": 2.0, "seconds_slowed": 7.0}
    lines[8] |= {"seconds_save": 3.0, "seconds_slowed": None}  # no step without a checkpoint to compare with
    story.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert story.hours.trained == pytest.approx(8 * 1000 / HOUR) and story.hours.saved == pytest.approx(8 * 12 / HOUR)
    assert story.hours.save_seconds == (9.0, 3.0)


def test_steps_after_the_last_checkpoint_are_trained_again_and_the_gap_was_waited(story):
    story.start(8, 0, 300)
    story.steps(1, 9, save=50, save_after=(4, 8))
    story.now += 700  # dies, and comes back
    story.start(8, 8, 200)
    story.steps(9, 10)
    found = story.hours
    assert found.again == pytest.approx(8 * 100 / HOUR)
    assert found.trained == pytest.approx(8 * 1000 / HOUR)
    assert found.saved == pytest.approx(8 * 100 / HOUR), "the save of step 8 stands in the line that was dropped"
    assert found.waiting == pytest.approx(8 * 700 / HOUR)
    assert found.starting == pytest.approx(8 * 500 / HOUR) and found.starts == 2


def test_a_checkpoint_whose_folder_was_damaged_counts_with_its_steps(story):
    story.start(2, 0, 10)
    story.steps(1, 9, save=50, save_after=(4, 8))
    story.start(2, 4, 10)
    assert story.hours.again == pytest.approx(2 * (500 + 50) / HOUR)
    assert story.hours.saved == pytest.approx(2 * 50 / HOUR)


def test_every_second_of_a_run_on_the_same_ranks_is_in_one_place(story):
    begun = story.now
    story.start(4, 0, 20)
    story.steps(1, 7, save=30, save_after=(3, 6))
    story.now += 60
    story.start(4, 6, 25)
    story.steps(7, 9, save=30, save_after=(9,))
    story.now += 45  # saved, stopped and begun again
    story.start(4, 9, 15)
    story.steps(10, 12)
    found = story.hours
    whole = found.trained + found.saved + found.again + found.starting + found.waiting
    assert whole == pytest.approx(4 * (story.now - begun) / HOUR)
    assert found.typical() == {"start": 20, "save": 30, "again": 52.5}


def test_each_step_counts_for_the_ranks_that_trained_it(story):
    story.start(8, 0, 0)
    story.steps(1, 4, save=0, save_after=(4,))
    story.start(2, 4, 0)
    story.steps(5, 6, seconds=400.0)
    assert story.hours.trained == pytest.approx((8 * 400 + 2 * 800) / HOUR)


def test_steps_that_were_not_logged_count_like_those_that_were(story):
    story.start(1, 0, 0)
    lines = [{"step": step, "seconds": 10.0} for step in (1, 5, 10)]
    story.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert story.hours.trained == pytest.approx(100 / HOUR)
    assert gpu_hours.left_behind(story.folder, 5)["seconds"] == 50


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"ranks": "many"}\n', '{"ranks": true, "began": 1}\n'])
def test_a_run_without_readable_starts_tells_nothing(story, text):
    story.steps(1, 3)
    assert story.hours is None
    (story.folder / gpu_hours.STARTS).write_text(text)
    assert story.hours is None


def test_a_run_that_was_begun_before_starts_were_noted_tells_nothing(story):
    story.steps(1, 3, save=0, save_after=(3,))
    story.start(4, 3, 5)
    story.steps(4, 5)
    assert story.hours is None, "what came before is not known"


def test_torn_and_edited_lines_are_left_out(story):
    story.start(4, 0, 5)
    story.steps(1, 2)
    with open(story.metrics, "a") as stream:
        stream.write('{"step": 3, "seconds": "long"}\n[1]\n{"step": 4, "sec')
    assert story.hours.trained == pytest.approx(4 * 200 / HOUR)


def test_the_screen_of_a_run_shows_them(story, monkeypatch):
    results = story.folder / "results" / "one"
    run = results / "train" / "runs" / "abc"
    run.mkdir(parents=True)
    (run / "settings.json").write_text("{}")
    inner = Story(run)
    inner.start(4, 0, 900)
    inner.steps(1, 9)
    monkeypatch.setattr(slurm_jobs, "jobs", lambda: None)
    assert "GPU hours   1.00 trained (50.0% of those held), 1.00 lost: 0.00 saving" in status.screen(results, None)

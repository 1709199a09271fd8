"""Grids of trainings: the search for a learning rate, the file, and resuming from it."""

import argparse
import concurrent.futures
import math
from typing import NamedTuple

import pytest
from scripts import ROOT, load_script


class Configuration(NamedTuple):
    normalization: str
    batch_size: int


CONFIGURATION = Configuration("batch_norm", 8)
SEEDS = (3, 1, 2)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield load_script("benchmarks/grids.py")


def result(script, accuracy, loss=1.0, test_accuracy=0.5):
    return script.Result(accuracy, loss, test_accuracy, 1.0, 10.0, "keras 3")


def search(script, accuracy_of, seeds=SEEDS):
    """Does what is asked for until nothing is; returns the results, in order."""
    results = {}
    while runs := script.next_runs(CONFIGURATION, seeds, results):
        assert not set(runs) & set(results)
        chosen = script.chosen_runs(CONFIGURATION, seeds, results)
        # None while the rate is searched, then those that are done.
        assert bool(chosen) == (not script.rates_to_try(CONFIGURATION, seeds[0], results))
        assert set(chosen) <= set(results)
        results[runs[0]] = result(script, accuracy_of(runs[0]))
    return results


@pytest.mark.parametrize("best", [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
def test_finds_the_best_rate_and_no_more_than_it_takes(script, best):
    results = search(script, lambda run: 1 - abs(math.log(run.learning_rate / best)) / 10)
    tried = sorted(run.learning_rate for run in results if run.seed == SEEDS[0])
    position = script.LEARNING_RATES.index(best)
    assert set(tried) == {*script.FIRST_RATES, *script.LEARNING_RATES[max(0, position - 1) : position + 2]} | {
        rate for rate in script.LEARNING_RATES if min(best, 0.03) <= rate <= max(best, 0.3)
    }
    chosen = script.chosen_runs(CONFIGURATION, SEEDS, results)
    assert chosen == [script.Run(CONFIGURATION, best, seed) for seed in SEEDS]
    assert set(chosen) <= set(results) and len(results) == len(tried) + len(SEEDS) - 1


def test_test_accuracy_chooses_nothing(script):
    results = {
        script.Run(CONFIGURATION, rate, 0): result(script, held_out, test_accuracy=1 - held_out)
        for rate, held_out in ((0.03, 0.7), (0.1, 0.8), (0.3, 0.75))
    }
    assert script.chosen_runs(CONFIGURATION, (0,), results) == [script.Run(CONFIGURATION, 0.1, 0)]


def test_of_equals_the_lower_loss_and_never_a_nan(script):
    tried = {0.03: result(script, 0.1, math.nan), 0.1: result(script, 0.1, 2.0), 0.3: result(script, 0.1, 3.0)}
    assert script.best_rate(tried) == 0.1


def test_one_seed(script):
    assert len(search(script, lambda run: -abs(run.learning_rate - 0.1), seeds=(0,))) == 3


def test_one_rate(script):
    run = script.Run(CONFIGURATION, 0.01, SEEDS[0])
    others = [run._replace(seed=seed) for seed in SEEDS[1:]]
    assert script.next_runs(CONFIGURATION, SEEDS, {run: result(script, 0.5)}, 0.01) == others
    assert script.count_missing(CONFIGURATION, SEEDS, {run: result(script, 0.5)}, 0.01) == 2


def test_file(script, tmp_path):
    path = tmp_path / "new" / "results.csv"
    assert script.read_results(path, Configuration) == {}
    results = {
        script.Run(CONFIGURATION, 0.1, 0): result(script, 0.125),
        script.Run(Configuration("group_norm_proxy:groups=4,proxy_epsilon=0.1", 2), 1.0, 1): result(script, math.nan),
    }
    for run, found in results.items():
        script.append_result(path, run, found)
    read = script.read_results(path, Configuration)
    assert list(read) == list(results) and repr(list(read.values())) == repr(list(results.values()))


def test_file_keeps_the_order_of_its_columns(script, tmp_path):
    path = tmp_path / "results.csv"
    header = sorted(script.columns(Configuration))
    path.write_text(",".join(header) + "\n")
    run = script.Run(CONFIGURATION, 0.1, 0)
    script.append_result(path, run, result(script, 0.5))
    assert path.read_text().splitlines()[0] == ",".join(header)
    assert script.read_results(path, Configuration) == {run: result(script, 0.5)}


def test_what_is_cut_off_is_named(script, tmp_path):
    path = tmp_path / "results.csv"
    for seed in range(2):
        script.append_result(path, script.Run(CONFIGURATION, 0.1, seed), result(script, 0.5))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(SystemExit, match="Line 3 of .*results.csv"):
        script.read_results(path, Configuration)


def test_other_columns_are_refused(script, tmp_path):
    path = tmp_path / "results.csv"
    script.append_result(path, script.Run(CONFIGURATION, 0.1, 0), result(script, 0.5))
    path.write_text(path.read_text().replace("seconds", "hours"))
    with pytest.raises(SystemExit, match="Line 2 of .*results.csv"):
        script.read_results(path, Configuration)


def test_remaining_time_is_from_runs_alike(script):
    results = {
        script.Run(CONFIGURATION, 0.1, 3): result(script, 0.5)._replace(seconds=4.0),
        script.Run(Configuration("batch_norm", 64), 0.1, 3): result(script, 0.5)._replace(seconds=1.0),
    }

    def seconds(*configurations):
        counts = {each: script.count_missing(each, SEEDS, results) for each in configurations}
        return script.remaining_seconds(counts, results)

    assert seconds(Configuration("none", 8), Configuration("none", 64)) == 5 * 4.0 + 5 * 1.0
    assert seconds(CONFIGURATION) == 4 * 4.0
    assert seconds() == 0


@pytest.fixture
def work(script, monkeypatch, tmp_path, capsys):
    """Calls `work` with threads in the place of processes; returns the runs that were done and what was printed."""
    monkeypatch.setattr(
        script, "start_pools", lambda jobs: [concurrent.futures.ThreadPoolExecutor(1) for _ in range(jobs)]
    )

    def work(configurations, *options, measure=None, **kwargs):
        parser = argparse.ArgumentParser()
        script.add_arguments(parser, tmp_path / "results.csv")
        done = []

        def recorded(run):
            done.append(run)
            return (measure or (lambda run: result(script, 1 - abs(run.learning_rate - 0.1))))(run)

        script.work(configurations, recorded, parser.parse_args(options), **kwargs)
        return done, capsys.readouterr().out

    return work


OTHERS = [CONFIGURATION, Configuration("none", 8)]


def test_work_resumes(script, work):
    """Stopped and called again, it does what is missing, and nothing twice."""
    done, printed = work(OTHERS[:1], "--seeds", "0", "--jobs", "1")
    assert [run.learning_rate for run in done] == [0.03, 0.1, 0.3] and "All of 1 configurations are done" in printed
    assert "batch_norm 8, rate 0.03, seed 0: held out accuracy 0.930, test accuracy 0.500, 10 s (about 1 min" in printed
    more, printed = work(OTHERS, "--jobs", "2")
    assert len(set(more)) == len(more) == 2 + 3 + 2 and not set(more) & set(done)
    assert {run for run in more if run.configuration == CONFIGURATION} == {
        script.Run(CONFIGURATION, 0.1, seed) for seed in (1, 2)
    }
    assert work(OTHERS, "--jobs", "2")[0] == []


def test_work_ends_when_the_time_is_up(work):
    done, printed = work(OTHERS, "--minutes", "0", "--jobs", "1")
    assert done == [] and "2 of 2 configurations are not done. Run it again to go on." in printed


def test_work_keeps_what_is_done_when_one_fails(script, work):
    def fail_later(run):
        if run.learning_rate == 0.3:
            raise RuntimeError("out of memory")
        return result(script, 0.5)

    with pytest.raises(RuntimeError, match="out of memory"):
        work(OTHERS[:1], "--seeds", "0", "--jobs", "1", measure=fail_later)
    done, _ = work(OTHERS[:1], "--seeds", "0", "--jobs", "1")
    assert done[0].learning_rate == 0.3


def test_work_with_given_rates(script, work):
    done, _ = work(OTHERS, "--jobs", "1", rate_of=lambda configuration: configuration.batch_size / 64)
    assert done == [script.Run(configuration, 0.125, seed) for configuration in OTHERS for seed in (0, 1, 2)]

"""What the job takes of a cluster that serves leaves room for an update of the service."""

from __future__ import annotations

import pytest

from data_jobs.references.embed.resources import SURGE_CPUS, NodeRoom, Resources, find_lacking, fit_in
from graphs.profiles import NUM_CPUS
from serve_app.domain.errors import StageFailed

SERVED = sum(NUM_CPUS.values())
#: The default node, of two cores, with one replica of each deployment.
SMALL = NodeRoom(cpus=2.0, free_cpus=2.0 - SERVED)
ANYTHING = {"actors": None, "actor_cpus": None}


def test_an_update_needs_what_the_replicas_hold() -> None:
    assert pytest.approx(SERVED) == SURGE_CPUS


@pytest.mark.parametrize("cores", [2, 64])
def test_the_defaults_leave_room_for_an_update_on_a_node_of_any_size(cores: int) -> None:
    node = NodeRoom(cpus=cores, free_cpus=cores - SERVED)
    taken = fit_in(Resources(actors=1), [node], **ANYTHING)
    assert taken.actors == cores
    assert 0.01 <= taken.actor_cpus <= 1.0
    assert 0.01 <= taken.write_cpus <= 0.25
    assert taken.cpus + SURGE_CPUS <= node.free_cpus + 1e-6
    # Several nodes are counted together.
    both = fit_in(Resources(actors=1), [node, NodeRoom(8.0, 8.0)], **ANYTHING)
    assert both.actors == cores + 8
    assert both.cpus + SURGE_CPUS <= node.free_cpus + 8.0 + 1e-6


def test_what_does_not_fit_is_refused_with_what_is_free() -> None:
    with pytest.raises(
        StageFailed, match=r"needs 2\.05 logical CPUs\. 1\.10 are free.* needs 0\.90 of those"
    ):
        fit_in(Resources(actors=1), [SMALL], actors=2, actor_cpus=1.0)
    with pytest.raises(StageFailed, match=r"0\.70 are free"):
        fit_in(Resources(actors=1), [NodeRoom(2.0, 0.7)], **ANYTHING)


def test_shares_that_lie_on_different_nodes_make_no_place_for_an_actor() -> None:
    nodes = [NodeRoom(1.0, 0.6)] * 8
    with pytest.raises(StageFailed, match=r"Only 0 of 2 actors find 1\.00 logical CPUs"):
        fit_in(Resources(actors=1), nodes, actors=2, actor_cpus=1.0)


def test_gpus_decide_how_many_actors_there_are() -> None:
    nodes = [NodeRoom(16.0, 15.0, free_gpus=1.5), NodeRoom(16.0, 16.0, free_gpus=2.0)]
    wanted = Resources(actors=1, actor_gpus=1.0, prepare_cpus=1.0)
    taken = fit_in(wanted, nodes, **ANYTHING)
    assert taken.actors == 3
    assert taken.prepare_tasks is not None
    held = taken.cpus + (taken.prepare_tasks - 1) * taken.prepare_cpus
    assert 30.0 < held + SURGE_CPUS <= 31.0
    with pytest.raises(StageFailed, match=r"Only 3 of 4 actors .* 1\.00 GPUs"):
        fit_in(wanted, nodes, actors=4, actor_cpus=None)
    with pytest.raises(StageFailed, match=r"Only 0 of 1 actors"):
        fit_in(wanted, [NodeRoom(16.0, 16.0, free_gpus=0.5)], actors=1, actor_cpus=None)


def test_what_a_node_lacks_is_named(tmp_path) -> None:
    assert find_lacking(tmp_path, tmp_path) == []
    (lacking,) = find_lacking(tmp_path / "nowhere", tmp_path)
    assert lacking == f"the folder {tmp_path / 'nowhere'}"

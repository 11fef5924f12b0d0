"""Processes that evaluate together end together."""

import multiprocessing

import torch.distributed as dist

from mmgem.evaluation.sharing import OtherProcessFailed, gather_parts, report_failure


def evaluate(rank, folder, outcomes):
    """Two gathers; process 1 fails between them."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    outcome = [gather_parts([rank])]
    try:
        if rank == 1:
            raise KeyError("caption")
        outcome.append(gather_parts([10 * rank]))
    except Exception as error:
        report_failure(error)
        outcome.append(f"{type(error).__name__}: {error}")
    outcome.append(gather_parts([rank]))
    outcomes.put((rank, outcome))
    dist.destroy_process_group()


def test_a_process_that_fails_ends_the_others_and_they_can_go_on_together(tmp_path):
    context = multiprocessing.get_context("fork")
    outcomes = context.Queue()
    processes = [context.Process(target=evaluate, args=(rank, tmp_path, outcomes)) for rank in range(3)]
    for process in processes:
        process.start()
    found = dict(outcomes.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    other = f"{OtherProcessFailed.__name__}: process 1: KeyError: 'caption'"
    whole = [0, 1, 2]
    assert found == {0: [whole, other, whole], 1: [whole, "KeyError: 'caption'", whole], 2: [whole, other, whole]}

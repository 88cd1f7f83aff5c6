"""One rank of torch.distributed's gloo: all_gather, without encryption, hashes or files.

Its connections are open before the clock starts, and the memory for what comes is there: a floor.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.systems.child import Task, digest_of, one_round, read_task, tell, told


def main(task: Task) -> None:
    torch.set_num_threads(1)
    tell(address=None)
    told()
    meeting = Path(task.updates) / "gloo-meeting"
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=task.place, world_size=task.peers
    )
    data = bytearray(task.update(task.place).read_bytes())
    mine = torch.frombuffer(data, dtype=torch.float32)
    gathered = [torch.ones_like(mine) for _ in range(task.peers)]  # touched, so that it is there
    dist.barrier()
    tell(ready=True)
    one_round(
        lambda: dist.all_gather(gathered, mine),
        lambda: digest_of(memoryview(each.numpy().data).cast("B") for each in gathered),
    )
    told()


if __name__ == "__main__":
    main(read_task())

"""A training process that is killed with SIGKILL continues exactly where it was."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from edge_agent.training.checkpoint import load_state
from simulations.processes import child_environment

N_STEPS = 400
SCRIPT = """
import sys
import numpy as np
from pathlib import Path
from edge_agent.data.tokens import Example
from edge_agent.training.sampling import ShuffledBatches
from edge_agent.training.trainer import LocalTrainer, RoundRecipe, TrainerOptions
from protocol.clock import SystemClock
from protocol.blocks import LoraBlock, TrainingBlock
from quant.adapter import adapter_shapes, initial_adapter, sent_layout
from quant.base_model import load_base, set_threads
from quant.lora import AdaptedModel

base_dir, state, out, n_steps = sys.argv[1:]
set_threads(1)
base = load_base(base_dir)
lora = LoraBlock(rank=4, alpha=8.0, dropout=0.1, target_modules=("q_proj", "v_proj"), init_seed=1)
rng = np.random.default_rng(0)
examples = []
for number in range(20):
    mask = np.zeros(24, np.bool_)
    mask[8:] = True
    ids = rng.integers(3, 300, 24).astype(np.int32)
    examples.append(
        Example(input_ids=ids, loss_mask=mask, source="made", category=None, truncated=False)
    )
block = TrainingBlock(batch_size=4, local_steps=int(n_steps), learning_rate=1e-2)
trainer = LocalTrainer(
    AdaptedModel(base, lora),
    examples,
    RoundRecipe(training=block, schedule_start=0.0, schedule_end=1.0, seed=3),
    sampler=ShuffledBatches(n_examples=20, batch_size=4, seed=5),
    clock=SystemClock(),
    options=TrainerOptions(state_path=Path(state), save_every_steps=7),
)
layout = sent_layout(adapter_shapes(base.description, lora), lora.sent)
result = trainer.run(initial_adapter(base.description, lora), layout, weight=1)
np.save(out, result.update.vector, allow_pickle=False)
"""


def start(base: Path, state: Path, out: Path) -> subprocess.Popen[bytes]:
    import protocol

    environment = {**child_environment(), "PYTHONPATH": str(Path(protocol.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, str(base), str(state), str(out), str(N_STEPS)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def test_a_training_killed_with_sigkill_ends_with_the_weights_of_an_uninterrupted_one(
    random_base_dir: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole.npy", tmp_path / "resumed.npy"
    assert start(random_base_dir, tmp_path / "state-whole", whole).wait(200) == 0

    state = tmp_path / "state"
    for _ in range(2):  # killed twice, at moments of nobody's choosing
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = start(random_base_dir, state, resumed)
        until = time.monotonic() + 100
        while not state.exists() or state.stat().st_mtime_ns == before:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.05)
        process.kill()
        process.wait()
        assert not resumed.exists()
    assert load_state(state, run="another") is None
    assert start(random_base_dir, state, resumed).wait(200) == 0
    np.testing.assert_array_equal(np.load(resumed), np.load(whole))

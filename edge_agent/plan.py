"""`sheepfold-agent plan`: will a model's training fit on a card? From its configuration alone."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.table import Table

from edge_agent.errors import ConfigError
from protocol.wire import JsonValue
from quant.errors import BaseModelError, MemoryLimitError
from quant.fitting import (
    USABLE_FRAC,
    Choice,
    Workload,
    choose,
    least,
    limit_for,
    longest_that_fits,
)
from quant.memory import Device
from quant.model_shape import LoraShape, read_shape_file
from quant.tiny import EMBEDDED_NAME, tiny_base_path

_CONFIG_NAME: Final = "config.json"
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB)?", re.IGNORECASE)
_GB: Final = 1_000_000_000
_GIB: Final = 2**30
_MOST_GB: Final = 100_000
_MB: Final = 1_000_000
_BAR_CHARS: Final = 30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training needs on a card.

    Attributes:
        model: As asked for.
        workload: The base, the adapter, the device, the longest example.
        gpu_bytes: Memory of the card.
        fits: Whether the choice needs at most 92 % of it.
        choice: The fastest settings that fit, or those that need the least.
        longest: Tokens of the longest example that would fit; None: none would.
    """

    model: str
    workload: Workload
    gpu_bytes: int
    fits: bool
    choice: Choice
    longest: int | None

    def advice(self) -> str:
        """One sentence: the settings that fit, or what would have to change."""
        settings, total = self.choice.settings, self.choice.estimate.total
        usable = USABLE_FRAC * self.gpu_bytes
        if not self.fits:
            text = (
                f"Does not fit: {_size(total)} are needed at the least, and {_size(usable)} "
                f"({USABLE_FRAC:.0%} of {_size(self.gpu_bytes)}) may be used. It takes a card of "
                f"{_size(limit_for(total))}"
            )
            if self.longest is not None:
                text += f", or --length {self.longest}"
            return text + ", or a smaller base."
        n_layers = self.workload.shape.n_layers
        n_twice = min(settings.n_checkpointed_layers, n_layers)
        examples = f" and {settings.max_examples} examples" if settings.max_examples else ""
        layers = f"{n_twice} of {n_layers} layers" if n_twice else "no layer"
        return (
            f"Fits: micro-batches of {settings.micro_tokens:,} tokens{examples}, {layers} computed "
            "twice, "
            f"logits of {settings.loss_chunk:,} tokens at once. {_size(total)} of the "
            f"{_size(usable)} ({USABLE_FRAC:.0%} of {_size(self.gpu_bytes)}) that may be used."
        )

    def as_json(self) -> dict[str, JsonValue]:
        """The plan for `--json`."""
        found = self.choice.estimate
        terms: dict[str, JsonValue] = {**asdict(found), "total": found.total}
        settings: dict[str, JsonValue] = {**asdict(self.choice.settings)}
        return {
            "model": self.model,
            "n_parameters": self.workload.shape.n_parameters,
            "n_adapter_parameters": self.workload.lora.n_parameters(self.workload.shape),
            "rank": self.workload.lora.rank,
            "length": self.workload.max_length,
            "dp": self.workload.private,
            "gpu_bytes": self.gpu_bytes,
            "usable_frac": USABLE_FRAC,
            "fits": self.fits,
            "settings": settings,
            "bytes": terms,
            "needed_gpu_bytes": limit_for(found.total),
            "longest_length": self.longest,
        }

    def heading(self) -> str:
        """The model, its adapter and the card, in one line."""
        shape, lora = self.workload.shape, self.workload.lora
        return (
            f"{self.model}: {shape.n_parameters / 1e6:,.1f} million parameters, "
            f"{lora.n_parameters(shape) / 1e6:,.1f} million in an adapter of rank {lora.rank}, "
            f"examples of up to {self.workload.max_length:,} tokens"
        )

    def table(self) -> Table:
        """The terms with a bar for each."""
        found = self.choice.estimate
        table = Table(show_header=False, box=None)
        for name, n_bytes in self._rows():
            bar = "█" * round(_BAR_CHARS * n_bytes / max(1, found.total))
            table.add_row(name, f"[bold]{_size(n_bytes)}[/]", f"[cyan]{bar}[/]")
        table.add_row("[bold]peak[/]", f"[bold]{_size(found.total)}[/]", "")
        return table

    def _rows(self) -> Iterator[tuple[str, int]]:
        found = self.choice.estimate
        backward = found.recomputed + found.backward
        yield "base in NF4", found.weights
        yield "adapter", found.adapters
        yield "Adam's moments", found.optimizer
        yield "gradients", found.gradients
        if found.per_example:
            yield "gradients by example (DP)", found.per_example
        yield "activations", found.activations
        # The loss is done before backward begins: only the larger of the two counts.
        if found.output_layer >= backward:
            yield "loss (backward needs less)", found.output_layer
        else:
            yield "backward (the loss needs less)", backward
        yield "one layer dequantised", found.dequantized
        yield "driver and libraries", found.context
        yield "fragmentation", found.fragmentation


def make_plan(model: str, workload: Workload, *, gpu_bytes: int) -> Plan:
    """Choose settings for a card, or say what the least would be.

    Args:
        model: As asked for.
        workload: What is trained, and where.
        gpu_bytes: Memory of the card.

    Raises:
        ConfigError: The examples are longer than what the model knows.
    """
    n_known = workload.shape.max_positions
    if workload.max_length > n_known:
        msg = f"--length {workload.max_length} is more than the {n_known} tokens {model!r} knows"
        raise ConfigError(msg)
    longest = longest_that_fits(workload, limit_bytes=gpu_bytes)
    try:
        choice, fits = choose(workload, limit_bytes=gpu_bytes), True
    except MemoryLimitError:
        choice, fits = least(workload), False
    return Plan(
        model=model,
        workload=workload,
        gpu_bytes=gpu_bytes,
        fits=fits,
        choice=choice,
        longest=longest,
    )


def plan_model(
    model: str, *, gpu: str, length: int, rank: int, private: bool, revision: str | None = None
) -> Plan:
    """Plan the training of a model on a card, with an adapter on all seven linear layers.

    Args:
        model: `"embedded:tiny"`, a folder, a `config.json`, or a hub id.
        gpu: Memory of the card, such as `"24GB"`.
        length: Tokens of the longest example.
        rank: Of the adapter.
        private: Gradients are kept example by example (DP).
        revision: Commit or tag of a hub model.

    Raises:
        ConfigError: `gpu` or `length` cannot be honoured.
        BaseModelError: No configuration, or not of the Llama class.
    """
    gpu_bytes = parse_memory(gpu)
    shape = read_shape_file(find_config(model, revision), name=model)
    workload = Workload(
        shape=shape,
        lora=LoraShape(rank=rank, modules=frozenset(shape.linears)),
        device=Device.cuda(),
        max_length=length,
        private=private,
    )
    return make_plan(model, workload, gpu_bytes=gpu_bytes)


def parse_memory(text: str) -> int:
    """Bytes of a size such as `24GB` (10⁹ bytes each), `24GiB` (2³⁰) or `24` (GB).

    Args:
        text: As typed.

    Raises:
        ConfigError: Not such a size.
    """
    match = _SIZE.fullmatch(text.strip())
    n_units = float(match[1]) if match is not None else 0.0
    unit = _GIB if match is not None and (match[2] or "").lower() == "gib" else _GB
    n_bytes = int(n_units * unit) if n_units <= _MOST_GB else 0
    if n_bytes <= 0:
        msg = f"a card's memory looks like 24GB or 24GiB, not {text[:40]!r}"
        raise ConfigError(msg)
    return n_bytes


def find_config(model: str, revision: str | None = None) -> Path:
    """Where a model's configuration lies; from the hub, nothing else is fetched.

    Args:
        model: `"embedded:tiny"`, a folder, a `config.json`, or a hub id.
        revision: Commit or tag of a hub model.

    Raises:
        BaseModelError: There is none.
    """
    if model == EMBEDDED_NAME:
        return tiny_base_path() / _CONFIG_NAME
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / _CONFIG_NAME
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        msg = f"there is no folder or configuration {model!r}; name one, or a model of the hub"
        raise BaseModelError(msg)
    # Here and not above: a folder's configuration needs no hub client.
    from huggingface_hub import hf_hub_download  # noqa: PLC0415

    try:
        return Path(hf_hub_download(model, _CONFIG_NAME, revision=revision))
    except Exception as error:  # of several libraries, none to build on
        first = str(error).strip().partition("\n")[0]
        msg = f"the hub does not give the configuration of {model!r}: {first}"
        raise BaseModelError(msg) from error


def _size(n_bytes: float) -> str:
    return f"{n_bytes / _GB:.2f} GB" if n_bytes >= 0.1 * _GB else f"{n_bytes / _MB:.1f} MB"

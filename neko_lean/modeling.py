"""Load a causal language model's parts: folder, tokenizer, student, backbone and head; and say what it is.

Everything is read from safetensors in a local folder; a hub name is fetched into the hub's own cache first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neko_lean.data import pad
from neko_lean.errors import NekoLeanError
from neko_lean.families import (
    backbone_of,
    embeddable_positions,
    linear_head,
    logit_transform,
    plain_outputs,
    refuse_sight_of_later_tokens,
    rescaling_length,
    stated_positions,
)
from neko_lean.generation_config import listed_ends
from neko_lean.head import LogitTransform, TokenViews, logits, token_stats, token_views
from neko_lean.loading import check_loaded, refuse_packed, stored_tensors
from neko_lean.progress import say
from neko_lean.quantized import dequantized, loading_options, quantization_method, refuse_gguf, refuse_quantized
from neko_lean.ranks import local_rank, local_size, size
from neko_lean.trust import reason, refuse_untrusted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LARGEST_SEED = 2**63 - 1  # what torch takes, with room for the steps and ranks that are added to a seed
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,9})?")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# A commit, branch or tag; it must not lead out of the hub's cache, where it becomes a file's name.
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>(?!.*\.\.)[\w-][\w./-]*))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class CausalLM:
    """A model split where training splits it: `backbone` computes hidden states, `head` and `transform` logits.

    Args:
        model: the whole model.
        backbone: the part of it whose last hidden states the head takes.
        scale, softcap: of `transform`, see `head.LogitTransform`.
        max_positions: the longest row that the model can embed; None: no table of positions sets a limit.
    """

    model: PreTrainedModel
    backbone: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    max_positions: int | None = None

    @property
    def head(self) -> Tensor:
        """The [V, d] weight of the output embedding."""
        return cast(Tensor, self._output_embedding.weight)

    @property
    def transform(self) -> LogitTransform:
        """What turns `hidden @ head.T` into logits."""
        return LogitTransform(cast("Tensor | None", self._output_embedding.bias), self.scale, self.softcap)

    @property
    def _output_embedding(self) -> nn.Module:
        # Asked for at each use: FSDP replaces parameters when it gathers them.
        return cast(nn.Module, self.model.get_output_embeddings())

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def embedding(self) -> Tensor:
        """The [V, d] weight of the input embedding; `head` itself where the two are tied."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    def hidden(self, input_ids: Tensor, places: Tensor | None = None) -> Tensor:
        """Last hidden states [B, L, d] after the final norm, for right-padded ids [B, L]; or [1, L, d] for rows packed
        end to end, with `places` [1, L] int64, each token's position in its own row, where the model `packs`.

        No mask is needed: attention is causal, so a real position never sees the padding behind it, and without a mask
        the attention kernel skips the upper triangle instead of reading it.
        """
        if places is None and self.max_positions is not None and input_ids.shape[1] > self.max_positions:
            raise NekoLeanError(
                f"a row of {input_ids.shape[1]} tokens is longer than the {self.max_positions} positions of "
                f"{type(self.model).__name__}: lower max_length."
            )
        more = {} if places is None else {"position_ids": places}
        try:
            hidden: Tensor = self.backbone(input_ids=input_ids, use_cache=False, **more).last_hidden_state
        except (NekoLeanError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the family's own code, such as a dtype or a length that it does not know
            raise NekoLeanError(
                f"the forward pass of {type(self.model).__name__} fails on rows of {input_ids.shape[1]} tokens in "
                f"{str(self.head.dtype).removeprefix('torch.')} ({reason(error)}): try another dtype or max_length."
            ) from error
        return hidden.to(self.head.dtype)  # Mamba keeps its residual stream in float32

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [c, V] in float32 (float64 for float64) of last hidden states [c, d], without gradient."""
        return logits(hidden, self.head, self.transform)


@torch.no_grad()
def next_token_logp(lm: CausalLM, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Log-probability of every token but the first of each row, row after row: [sum of (length - 1)] float32."""
    input_ids, mask = pad(rows, pad_id, lm.device)
    real = mask[:, 1:].bool()  # [B, L - 1]
    hidden = lm.hidden(input_ids)[:, :-1][real]
    target_logp: Tensor = token_stats(hidden, lm.head, input_ids[:, 1:][real], transform=lm.transform)[0]
    return target_logp


@torch.no_grad()
def next_token_views(lm: CausalLM, rows: Sequence[Sequence[int]], pad_id: int) -> list[TokenViews]:
    """What the model thinks of every token but the first of each row: one TokenViews a row, [length - 1] each."""
    input_ids, mask = pad(rows, pad_id, lm.device)
    real = mask[:, 1:].bool()  # [B, L - 1]
    hidden = lm.hidden(input_ids)[:, :-1][real]
    views = token_views(hidden, lm.head, input_ids[:, 1:][real], lm.transform)
    columns = [column.split([len(row) - 1 for row in rows]) for column in views]
    return [TokenViews(*one) for one in zip(*columns, strict=True)]


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; by default CUDA where there is one, else the CPU. Under torchrun a rank's own GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if _DEVICE.fullmatch(name) is None:
        raise NekoLeanError(f"device {name!r} is not supported: use cpu, cuda or cuda:N.")
    if size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise NekoLeanError(f"under torchrun each rank has a GPU of its own: give --device cuda, not {name}.")
        _refuse_more_ranks_than_gpus()
        name = f"cuda:{local_rank()}"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise NekoLeanError(f"device {name!r} was asked for, but PyTorch sees no GPU here: use --device cpu.")
        count = torch.cuda.device_count()
        if int(name.removeprefix("cuda").removeprefix(":") or 0) >= count:
            last = f"the last GPU that PyTorch sees here is cuda:{count - 1}"
            raise NekoLeanError(f"device {name!r} does not exist: {last}.")
    return torch.device(name)


def check_seed(seed: int) -> int:
    """The seed, if random number generators take it. Raises NekoLeanError for one below 0 or above 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise NekoLeanError(f"seed must be an integer from 0 to {LARGEST_SEED}, got {_brief(seed)}.")
    return seed


def _brief(value: object) -> str:
    """A value for a message: Python refuses to write integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "one of more than 30 digits"
    return repr(value)


def _refuse_more_ranks_than_gpus() -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < local_size():
        raise NekoLeanError(
            f"torchrun started {local_size()} processes on this machine, which has {gpus} GPU{'s' * (gpus > 1)}, and "
            f"each needs a GPU: use --nproc-per-node {gpus}, or --device cpu."
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; a CPU without that takes tens of times as long."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_emulated_bfloat16(dtype: str, device: torch.device, quiet: bool) -> None:
    """Say that training in bfloat16 will be slow where the device only emulates it."""
    if dtype == "bfloat16" and not has_bfloat16(device):
        say("warning: this CPU emulates bfloat16, so steps will be slow: --set dtype=float32 is faster.", quiet)


def pick_dtype(name: str) -> torch.dtype:
    """'bfloat16' or 'float32' as a torch.dtype."""
    if name not in DTYPES:
        raise NekoLeanError(f"dtype {name!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def model_folder(model: str | Path, *, config_only: bool = False) -> Path:
    """The local folder of a checkpoint; a hub name ('owner/name', or 'owner/name@revision') is downloaded (with
    `config_only` no more than config.json), anything else is an error."""
    path = Path(model)
    if not path.is_dir():
        path = _from_hub(str(model), path, config_only)
    if not (path / "config.json").is_file():
        refuse_gguf(path)
        raise NekoLeanError(f"{path} holds no config.json: it is not a Hugging Face checkpoint folder.")
    refuse_untrusted(path)
    refuse_quantized(path)
    return path


def _from_hub(text: str, path: Path, config_only: bool) -> Path:
    """The one place that uses the network, and by HF_HUB_OFFLINE=1 it does not either."""
    named = _HUB_NAME.fullmatch(text)
    if path.exists() or named is None:
        raise NekoLeanError(f"{text} is neither a checkpoint folder nor a hub name (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json"] if config_only else _HUB_FILES
        return Path(snapshot_download(named["name"], revision=named["revision"], allow_patterns=files))
    except Exception as error:  # the hub's client raises a dozen types; all of them mean that there is no model
        raise NekoLeanError(f"{text} is no local folder, and the hub did not give it: {reason(error)}") from error


def model_name(model: str | Path) -> str:
    """What to call a model in files: its hub name, or the name of its folder without the way there."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else str(model)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder, with a padding token that the model has a row for.

    Where it has none, another special token is used, EOS first: masks keep padding out of every number.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise NekoLeanError(
            f"{folder} holds no tokenizer that transformers can load: {reason(error)}; get its tokenizer files again."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise NekoLeanError(f"{folder} holds a {type(tokenizer).__name__}, which is not a text tokenizer.")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Without its files transformers makes up an empty tokenizer of the model's family.
        raise NekoLeanError(f"{folder} holds no tokenizer: its files (tokenizer.json and the like) are missing.")
    known = _vocab_size(folder)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = _padding_token(tokenizer, folder, known)
    return tokenizer


def _vocab_size(folder: Path) -> int:
    """The model's vocabulary size according to config.json; unlimited without one."""
    if not (folder / "config.json").is_file():
        return sys.maxsize
    size = getattr(load_config(folder).get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) else sys.maxsize


def _padding_token(tokenizer: PreTrainedTokenizerBase, folder: Path, known: int) -> str:
    """A special token below `known` to pad with."""
    for token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, *tokenizer.all_special_tokens):
        if token is not None and cast(int, tokenizer.convert_tokens_to_ids(token)) < known:
            return str(token)
    raise NekoLeanError(
        f"the tokenizer in {folder} has neither a padding nor an EOS token that the model knows: give it one."
    )


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """Load a checkpoint's weights from safetensors as `dtype` onto `device`.

    Raises NekoLeanError where the files do not hold exactly the tensors of the model that config.json describes, or a
    tensor holds NaN or infinite values; see `loading.check_loaded`.
    """
    from transformers import AutoModelForCausalLM

    listed_ends(folder)  # transformers passes over a generation config that it cannot read
    stored, method = stored_tensors(folder), quantization_method(folder)
    if method is None:
        refuse_packed(stored)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded names them
            **loading_options(method, device),
        )
    except Exception as error:  # transformers raises a dozen types
        if "conversion of the weights" in str(error):
            raise NekoLeanError(
                f"the tensors in {folder} do not fit together to those of its config.json, as with an expert that is "
                f"missing: get the checkpoint again."
            ) from error
        raise NekoLeanError(f"{folder} cannot be loaded as a causal language model: {reason(error)}") from error
    model, info = loaded
    model = dequantized(model, method, dtype)
    check_loaded(model, folder, stored, info, packed=method is not None)
    return split(model.to(device))  # type: ignore[arg-type]


def load_config(folder: Path) -> PreTrainedConfig:
    """What config.json says, as transformers' own class for that kind of model."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a dozen types, transformers' validation errors among them
        raise NekoLeanError(f"{folder / 'config.json'} is no model that transformers has: {reason(error)}") from error
    if hasattr(config, "quantization_config"):  # it describes the weights in the folder; those of a new model are plain
        del config.quantization_config
    return config


def new_model(config_folder: Path, dtype: torch.dtype, device: torch.device, seed: int) -> CausalLM:
    """A model with random weights from config.json alone, the same for the same seed; with the end tokens of the
    folder's generation_config.json."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(config_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if listed_ends(config_folder) is not None:
        model.generation_config = GenerationConfig.from_pretrained(config_folder, local_files_only=True)
    return split(model.to(device=device, dtype=dtype))


@torch.no_grad()
def split(model: PreTrainedModel) -> CausalLM:
    """Find how a model's logits follow from its hidden states, and check that they do and that its attention is causal.

    Raises NekoLeanError for families of which either is not so.
    """
    family = type(model).__name__
    linear_head(model)
    plain_outputs(model)
    was_training = model.training
    model.eval()
    try:
        backbone = backbone_of(model)
        scale, softcap = logit_transform(model, backbone)
        lm = CausalLM(model, backbone, scale, softcap, embeddable_positions(model, model.config))
        probe = torch.arange(4, device=lm.device)[None] % len(lm.head)  # [1, 4]
        wanted = model(input_ids=probe, use_cache=False).logits[0].float()  # [4, V]
        got = lm.logits(lm.hidden(probe)[0])  # [4, V]
        refuse_sight_of_later_tokens(model, lm.hidden)
    finally:
        model.train(was_training)
    tolerance = 0.02 if lm.head.dtype == torch.bfloat16 else 1e-4
    # Where the model's own logits are NaN or infinite, later checks name the row.
    if wanted.isfinite().all() and not (wanted - got).abs().max() <= tolerance * (1 + wanted.abs().max()):
        raise NekoLeanError(f"{family} is not supported: its logits do not follow from its last hidden states.")
    return lm


def position_limit(lm: CausalLM, wanted: int) -> int:
    """The longest row that the model can embed, at most `wanted` tokens."""
    return min(wanted, lm.max_positions or wanted)


def usable_length(folder: Path, max_length: int) -> int:
    """`position_limit` of the checkpoint in `folder`, from its config alone."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    limits = [limit for limit in (stated_positions(config), rescaling_length(config)) if limit is not None]
    if max_length <= min(limits, default=max_length):
        return max_length
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return min(max_length, embeddable_positions(model, config) or max_length)


@torch.no_grad()
def packs(lm: CausalLM) -> bool:
    """Whether rows of a micro-batch may lie end to end as one [1, L], `hidden` being given their places.

    Only where the attention kernel takes rows of any length (FlashAttention's own package, FlexAttention): elsewhere
    keeping rows apart takes a mask [L, L], and with one SDPA leaves its flash kernel. And only where the model is seen
    to keep them apart: two rows packed are what each is alone, and one does not change with what lies before it.
    """
    kernel = str(lm.model.config._attn_implementation)
    return ("flash" in kernel or kernel == "flex_attention") and keeps_apart(lm)


@torch.no_grad()
def keeps_apart(lm: CausalLM) -> bool:
    """Whether two packed rows are what each is alone, and one does not change with what lies before it."""
    was_training = lm.model.training
    lm.model.eval()
    one, other, two = (torch.arange(n, n + 24, device=lm.device)[None] % len(lm.head) for n in (0, 24, 48))  # [1, 24]
    places = torch.arange(24, device=lm.device).repeat(2)[None]  # [1, 48]
    try:
        packed = lm.hidden(torch.cat([one, two], 1), places).float()
        changed = lm.hidden(torch.cat([other, two], 1), places).float()
        alone = torch.cat([lm.hidden(one), lm.hidden(two)], 1).float()
    except NekoLeanError:  # it takes no positions, or its kernel does not run here
        return False
    finally:
        lm.model.train(was_training)
    tolerance = 0.02 if lm.head.dtype == torch.bfloat16 else 1e-4
    near = bool((packed - alone).abs().max() <= tolerance * (1 + alone.abs().max()))
    return near and torch.equal(packed[:, 24:], changed[:, 24:])


def checkpoint_activations(model: nn.Module) -> list[nn.Module]:
    """Keep only each layer's input for the backward pass and compute the rest again there; returns those layers.

    transformers' own switch works in training mode only, in which dropout is on as well; this one works in both.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()  # of a layer that is checkpointed already
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            inside.update(module.modules())
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
            layers.append(module)
    return layers

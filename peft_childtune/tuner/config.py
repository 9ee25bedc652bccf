"""The configuration of the method."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from peft.config import PeftConfig

from ..errors import ConfigError, UnsupportedError
from ..scores import is_score, score_names, sees_data
from ..untrusted import shown
from ..weights import digest
from .config_checks import check_types
from .config_file import check_beside, save_config
from .registration import ChildTuningPeftType

__all__ = ["ChildTuningConfig"]

Mode = Literal["task_driven", "task_free"]
Scope = Literal["global", "layer", "tensor", "row"]
Granularity = Literal["element", "row", "column", "block"]
SaveDtype = Literal["float32", "bfloat16", "float16"]

_SEALED_WITHOUT = {"score": "fisher", "scope": "global"}  # what a digest says nothing of


@dataclass
class ChildTuningConfig(PeftConfig):
    """Configuration of [`ChildTuningModel`]: which child network of the base model is trained.

    Args:
        target_modules (`Union[list[str], str]`, *optional*, defaults to `None`):
            The names of the modules to adapt: a list of names or name endings, a regular expression, or `all-linear`.
            `None` means every module with weights inside the repeated transformer blocks, found by structure:
            weights, biases and norms alike, without embeddings, pooler and head.
        exclude_modules (`Union[list[str], str]`, *optional*, defaults to `None`):
            The names of modules to leave out, or a regular expression.
        mode (`str`, *optional*, defaults to `task_driven`):
            `task_driven`: a fixed child, chosen by `score`. `task_free` (Child-Tuning-F): chosen at random, see
            `resample`.
        density (`float`, *optional*, defaults to `0.3`):
            The kept fraction of the covered weights, in (0, 1].
        score (`str`, *optional*, defaults to `movement`):
            What makes a weight worth training (task_driven only). `movement` (how far it moves in full fine-tuning,
            which is taken back: the best in `examples/study`, with the time and memory that full fine-tuning takes),
            `fisher` (per-example empirical Fisher information: Child-Tuning-D, the paper's child), `fisher_batch` (the
            authors' estimate from batch gradients) and `gradient` need data: call `select_child_network(model,
            dataloader)`. `magnitude` and `random` need none. Or the name of a score of your own, see `register_score`.
        scope (`str`, *optional*, defaults to `None`):
            Over what the budget is shared: `global` (all tensors), `layer` (each transformer block), `tensor` (each
            tensor) or `row` (each output neuron). `None` means `tensor` for movement, and `global` for all else.
        granularity (`str`, *optional*, defaults to `element`):
            What is kept or left as one: `element`, `row` (an output neuron), `column` (an input) or `block` (a square
            tile of `block_size`). Entries of biases and norms always count one by one.
        block_size (`int`, *optional*, defaults to `16`):
            The side of the tiles of `granularity="block"`.
        resample (`bool`, *optional*, defaults to `False`):
            task_free only. `True` draws a new gradient mask at every optimizer step, as in the paper: every covered
            weight changes, so the saved delta is dense. `False` keeps one random child.
        seed (`int`, *optional*, defaults to `0`):
            The seed of random children and masks.
        save_dtype (`str`, *optional*, defaults to `None`):
            The dtype in which the delta is saved: `float32`, `bfloat16` or `float16`; `None` keeps the one it has.
        init_weights (`bool`, *optional*, defaults to `True`):
            `True` starts from a delta of zero: the adapter changes nothing until it is trained. `False` starts from
            random values, for tests.
        modules_to_save (`list[str]`, *optional*, defaults to `None`):
            Modules apart from the child that are trained and saved whole, for example a fresh head.
        layers_to_transform (`Union[list[int], int]`, *optional*, defaults to `None`):
            The indices of the blocks to adapt; the others are left alone.
        layers_pattern (`Union[list[str], str]`, *optional*, defaults to `None`):
            The name of the list of blocks, where it is not the usual one; used with `layers_to_transform`.
        target_parameters (`list[str]`, *optional*, defaults to `None`):
            Not supported: anything but `None` raises an error.
        selection (`dict`, *optional*, defaults to `None`):
            How the child was chosen: filled in by the selection, for the record only.
        child (`dict[str, list[int]]`, *optional*, defaults to `None`):
            Kept entries and coded bytes of each covered tensor: written when an adapter is saved, so that loaders can
            size its tensors. Its presence means that weights are about to be loaded; leave it alone.
        pickled (`bool`, *optional*, defaults to `False`):
            Whether the weights are a pickle, `adapter_model.bin`: written when an adapter is saved with
            `safe_serialization=False`. A pickle is loaded only if this says so; leave it alone.

    Example:
        >>> ChildTuningConfig(task_type="SEQ_CLS", density=0.02).score
        'movement'
        >>> ChildTuningConfig(task_type="SEQ_CLS", density=0.3, score="fisher").budget_scope  # Child-Tuning-D
        'global'

    Source: Xu et al. 2021 (arXiv:2109.05687).
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": (
                "The names of the modules to adapt: a list of names or name endings, a regular expression, or "
                "`all-linear`. `None` means every module with weights inside the repeated transformer blocks, found "
                "by structure: weights, biases and norms alike, without embeddings, pooler and head."
            )
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "The names of modules to leave out, or a regular expression."}
    )
    mode: Mode = field(
        default="task_driven",
        metadata={
            "help": (
                "`task_driven`: a fixed child, chosen by `score`. `task_free` (Child-Tuning-F): chosen at random, see "
                "`resample`."
            )
        },
    )
    density: float = field(default=0.3, metadata={"help": "The kept fraction of the covered weights, in (0, 1]."})
    score: str = field(
        default="movement",
        metadata={
            "help": (
                "What makes a weight worth training (task_driven only). `movement` (how far it moves in full "
                "fine-tuning, which is taken back: the best in `examples/study`, with the time and memory that full "
                "fine-tuning takes), `fisher` (per-example empirical Fisher information: Child-Tuning-D, the paper's "
                "child), `fisher_batch` (the authors' estimate from batch gradients) and `gradient` need data: call "
                "`select_child_network(model, dataloader)`. `magnitude` and `random` need none. Or the name of a "
                "score of your own, see `register_score`."
            )
        },
    )
    scope: Scope | None = field(
        default=None,
        metadata={
            "help": (
                "Over what the budget is shared: `global` (all tensors), `layer` (each transformer block), `tensor` "
                "(each tensor) or `row` (each output neuron). `None` means `tensor` for movement, and `global` for "
                "all else."
            )
        },
    )
    granularity: Granularity = field(
        default="element",
        metadata={
            "help": (
                "What is kept or left as one: `element`, `row` (an output neuron), `column` (an input) or `block` "
                "(a square tile of `block_size`). Entries of biases and norms always count one by one."
            )
        },
    )
    block_size: int = field(default=16, metadata={"help": 'The side of the tiles of `granularity="block"`.'})
    resample: bool = field(
        default=False,
        metadata={
            "help": (
                "task_free only. `True` draws a new gradient mask at every optimizer step, as in the paper: every "
                "covered weight changes, so the saved delta is dense. `False` keeps one random child."
            )
        },
    )
    seed: int = field(default=0, metadata={"help": "The seed of random children and masks."})
    save_dtype: SaveDtype | None = field(
        default=None,
        metadata={
            "help": (
                "The dtype in which the delta is saved: `float32`, `bfloat16` or `float16`; `None` keeps the one "
                "it has."
            )
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": (
                "`True` starts from a delta of zero: the adapter changes nothing until it is trained. `False` "
                "starts from random values, for tests."
            )
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules apart from the child that are trained and saved whole, for example a fresh head."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "The indices of the blocks to adapt; the others are left alone."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": ("The name of the list of blocks, where it is not the usual one; used with `layers_to_transform`.")
        },
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Not supported: anything but `None` raises an error."}
    )
    selection: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "How the child was chosen: filled in by the selection, for the record only."},
    )
    child: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": (
                "Kept entries and coded bytes of each covered tensor: written when an adapter is saved, so that "
                "loaders can size its tensors. Its presence means that weights are about to be loaded; leave it "
                "alone."
            )
        },
    )
    pickled: bool = field(
        default=False,
        metadata={
            "help": (
                "Whether the weights are a pickle, `adapter_model.bin`: written when an adapter is saved with "
                "`safe_serialization=False`. A pickle is loaded only if this says so; leave it alone."
            )
        },
    )

    def __post_init__(self) -> None:
        """Check every option, alone and with the others."""
        check_types(self.__dict__)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = ChildTuningPeftType.CHILD_TUNING
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's own configs do
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_choices()
        self._check_numbers()
        self._check_combinations()
        self.__dict__["_file_digest"] = None if self.child is None else self.own_digest()

    @property
    def needs_data(self) -> bool:
        """Whether the child can be chosen only by `select_child_network(model, dataloader)`."""
        return self.mode == "task_driven" and sees_data(self.score)

    @property
    def chosen_by(self) -> str:
        """The option that says how the child is chosen, for messages."""
        return 'mode="task_free"' if self.mode == "task_free" else f'score="{self.score}"'

    @property
    def budget_scope(self) -> Scope:
        """Over what the budget is shared: `scope`, or what its `None` stands for."""
        if self.scope is not None:
            return self.scope
        return "tensor" if self.mode == "task_driven" and self.score == "movement" else "global"

    @property
    def file_digest(self) -> bytes | None:
        """The digest of the fields of this class as they came from a file; None for a configuration made by hand."""
        found: bytes | None = self.__dict__["_file_digest"]
        return found

    @property
    def made_for(self) -> str:
        """What the configuration says of the base model that its adapter is for."""
        if self.base_model_name_or_path is None:
            return "the base model that it was trained on (its adapter_config.json names none)"
        revision = "" if self.revision is None else f", revision {self.revision!r}"
        return f"{self.base_model_name_or_path!r}{revision}, as its adapter_config.json says"

    def own_digest(self, **changes: Any) -> bytes:
        """Return 16 bytes that depend on the fields of this class: those that differ from the defaults of version 1.

        A default that changes is put into `_SEALED_WITHOUT` as it was: files that were sealed before stay valid.

        Args:
            changes: fields to be taken as something else than they are now.
        """
        own = {f.name: f.default for f in fields(self) if f.name in ChildTuningConfig.__annotations__}
        own |= _SEALED_WITHOUT
        own.pop("pickled")  # not known when the weights are sealed
        held = self.to_dict() | changes
        for name in ("target_modules", "exclude_modules", "modules_to_save"):  # a file has lists only, of any order,
            if isinstance(held[name], list | tuple):  # and PEFT repeats its own entries whenever it loads
                held[name] = sorted(set(held[name]))
        return digest(json.dumps({k: held[k] for k in own if held[k] != own[k]}, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary that JSON can hold, the same one every time."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> ChildTuningConfig:
        """Load as PEFT does, with a look at the weights beside it, if that is a folder: PEFT opens them next.

        Raises:
            FormatError: the weights file is not sound.
            IntegrityError: it is not the one that the configuration was saved with.
            UnsupportedError: the weights are a pickle, and were not saved as one.
        """
        config: ChildTuningConfig = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        if isinstance(config, ChildTuningConfig):
            folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
            check_beside(folder, config.child, pickled=config.pickled)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, whole or not at all, with the sizes of the adapter that is being saved along with it.

        PEFT has written that adapter's weights file just before: it is flushed to the disk, too.

        Raises:
            UnsupportedError: the weights were saved as a pickle, beside an older safetensors file.
        """
        alone = "_layout" not in self.__dict__
        saved = self.to_dict() | {"child": self.__dict__.pop("_layout", self.child)}
        if (mapping := kwargs.get("auto_mapping_dict")) is not None:
            saved["auto_mapping"] = mapping
        save_config(save_directory, saved, alone=alone)

    def _check_choices(self) -> None:
        choices = {"mode": Mode, "scope": Scope, "granularity": Granularity, "save_dtype": SaveDtype}
        for name, literal in choices.items():
            value = getattr(self, name)
            if value not in get_args(literal) and not (name in ("scope", "save_dtype") and value is None):
                raise ConfigError(f"{name}={shown(value)} is not one of {', '.join(map(repr, get_args(literal)))}.")

        # one that was loaded chooses nothing any more, and its score may be registered elsewhere only
        if self.child is None and not is_score(self.score):
            raise ConfigError(
                f"score={shown(self.score)} is not one of {', '.join(map(repr, score_names()))}; one of your own has "
                "to be registered first: peft_childtune.register_score(name, function). In a saved configuration it "
                "says that this was saved before its child was chosen."
            )

    def _check_numbers(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise ConfigError(
                f"density={shown(self.density)} is outside (0, 1]; it is the kept fraction, 0.02 keeps 2 % of the "
                "weights."
            )
        if (
            isinstance(self.block_size, bool)
            or not isinstance(self.block_size, int)
            or not 0 < self.block_size < 2**62
        ):
            raise ConfigError(
                f"block_size={shown(self.block_size)} is no side of a tile; use an integer >= 1, for example 16."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={shown(self.seed)} is outside [0, 2**63); use a non-negative integer.")

    def _check_combinations(self) -> None:
        if self.target_parameters is not None:
            raise UnsupportedError(
                "target_parameters is not supported: name the modules that own the parameters in `target_modules`; "
                "all parameters of a module are covered."
            )
        if self.resample and self.mode != "task_free":
            raise ConfigError(
                'resample=True belongs to mode="task_free" (Child-Tuning-F); a task-driven child stays fixed.'
            )
        # a default, that of today or of earlier files, is no choice that somebody made
        if self.mode == "task_free" and self.score not in ("movement", "fisher", "random"):
            raise ConfigError(
                f'score={shown(self.score)} has no meaning with mode="task_free", which chooses at random.'
            )
        if self.resample and (self.granularity != "element" or self.budget_scope != "global"):
            raise ConfigError(
                "resample=True draws a mask over single entries; leave granularity='element' and scope='global'."
            )
        if self.scope == "row" and self.granularity != "element":
            raise ConfigError(
                f'scope="row" shares the budget inside each output neuron, so granularity={self.granularity!r} '
                "cannot be kept; "
                'use granularity="element" or another scope.'
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "layers_to_transform cannot be used when target_modules is a str; list the names instead."
            )
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ConfigError("layers_pattern cannot be used when target_modules is a str; list the names instead.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is set, but layers_to_transform is not; name the blocks to adapt.")

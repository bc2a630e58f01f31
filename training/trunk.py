"""The frozen lower layers, run once for each row, and the trained upper ones.

A layer below the adapter gives the same activations in every epoch. They are kept in memory for the
round (0.16 MB for a row of 70 tokens at width 576), so an epoch costs only the layers that learn.
Models that are not just `model.layers` between an embedding, `model.norm` and a head run whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perennial.infra.errors import TrainingError
from perennial.training.batching import Packed, cut, pack
from perennial.training.fused import LLAMA_LIKE, FusedLayer, Rows, can_fuse
from perennial.training.loss import PositionLosses, Targets, head_losses, plain_losses
from perennial.training.machine import in_halves
from perennial.training.tokens import TokenRow

Kernels = Literal["fused", "plain"]


class SplitModel:
    """A causal model cut at layer `num_frozen`: trunk below, top above.

    Packed rows and trunks come from the CPU, one copy of each a batch; what is computed stays on
    the model's device. `model` is the plain transformers model; adapters may be attached inside
    it. Kernels "fused" are used where the layers allow it.

    dtype: of activations. The fused layers of a CPU have them in float32 beside weights in bf16,
    as torch's autocast has: in bf16 the adapter's part is rounded away beside the weights'.
    """

    def __init__(
        self,
        model: Any,  # Any: transformers
        num_frozen: int,
        kernels: Kernels = "plain",
    ) -> None:
        self.model = model
        self.head: Any = model.get_output_embeddings()
        self._can_split = model.config.model_type in LLAMA_LIKE
        self.num_frozen = num_frozen if self._can_split else 0
        self.device: torch.device = self.head.weight.device
        if self._can_split:
            self.decoder = model.model
            self._layers = self.decoder.layers
        self._fused: list[FusedLayer] = []
        if kernels == "fused" and can_fuse(model):
            size = self._layers[0].self_attn.head_dim
            self._fused = [FusedLayer(layer, size) for layer in self._layers]
        self.weight_dtype: torch.dtype = self.head.weight.dtype
        is_wide = bool(self._fused) and self.device.type == "cpu"
        self.dtype = torch.float32 if is_wide else self.weight_dtype

    def trunk(self, rows: Sequence[TokenRow], batch_tokens: int) -> list[Tensor]:
        """Input activations of the first trained layer for each row, (T, width), on the CPU."""

        def run(part: Sequence[TokenRow]) -> list[Tensor]:
            packed = pack(part, labels=["completion"] * len(part))
            with torch.no_grad():
                hidden_ND = self._run(self._embed(packed), packed, slice(0, self.num_frozen), False)
            return _rows_of(hidden_ND.cpu(), packed)

        spans = cut([row.num_tokens for row in rows], batch_tokens)
        return [kept for span in spans for kept in in_halves(run, [rows[i] for i in span])]

    def on_device(self, array: NDArray[Any]) -> Tensor:
        """The numbers where the model is."""
        return torch.from_numpy(array).to(self.device)

    def hidden(self, packed: Packed, trunks: Sequence[Tensor] | None) -> Tensor:
        """Final hidden states of the packed tokens, (N, width), from the rows' trunk activations.

        Without them the whole model runs.
        """
        if trunks is None:
            return self._run(self._embed(packed), packed, slice(0, None), True)
        trunk_ND = _packed_of(trunks, packed).to(self.device)
        return self._run(trunk_ND, packed, slice(self.num_frozen, None), True)

    def logits(self, packed: Packed, trunks: Sequence[Tensor] | None) -> Tensor:
        """Logits at the predicting positions only, (M, vocabulary)."""
        if not self._can_split:
            return self._whole_logits(packed)
        hidden_ND = self.hidden(packed, trunks)
        hidden_MD = hidden_ND[self.on_device(packed.predict_M)]
        logits: Tensor = self.head(hidden_MD.to(self.weight_dtype))
        return logits

    def losses(
        self, packed: Packed, trunks: Sequence[Tensor] | None, targets: Targets
    ) -> PositionLosses:
        """Losses at the predicting positions."""
        if not self._fused or getattr(self.head, "bias", None) is not None:
            return plain_losses(self.logits(packed, trunks), targets)
        at = self.on_device(packed.predict_M)
        return head_losses(self.hidden(packed, trunks).index_select(0, at), self.head, targets)

    def check_split(self, row: TokenRow) -> None:
        """Raise TrainingError unless packed rows have the logits that a row alone has."""
        rows = [row, row]
        packed = pack(rows, labels=["completion"] * 2)
        ids_1T = self.on_device(row.ids_T)[None]
        with torch.no_grad():
            alone = self.model(
                input_ids=ids_1T,
                logits_to_keep=row.num_tokens - row.num_prompt + 1,
                use_cache=False,
            ).logits[0, :-1]
            trunks = self.trunk(rows, 2 * row.num_tokens) if self.num_frozen else None
            gap = float((self.logits(packed, trunks) - alone.repeat(2, 1)).abs().max())
        tolerance = 1e-3 if self.weight_dtype == torch.float32 else 0.1
        if not gap < tolerance * max(1.0, float(alone.abs().max())):
            raise TrainingError(
                f"logits of packed rows differ by {gap:.2g} from those of a row alone: this cannot "
                f"train {self.model.config.model_type}; set kernels to 'plain' or base_model to "
                "another architecture",
                gap=gap,
            )

    def _whole_logits(self, packed: Packed) -> Tensor:
        logits: Tensor = self.model(
            input_ids=self.on_device(packed.ids_N)[None],
            attention_mask=self._mask(packed),
            position_ids=self.on_device(packed.source_N)[None],
            logits_to_keep=self.on_device(packed.predict_M),
            use_cache=False,
        ).logits[0]
        return logits

    def _mask(self, packed: Packed) -> Tensor:
        visible = self.on_device(packed.visible_NN)
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[None, None]

    def _embed(self, packed: Packed) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(self.on_device(packed.ids_N))
        return embedded.to(self.dtype)

    def _run(self, hidden_ND: Tensor, packed: Packed, part: slice, is_final: bool) -> Tensor:
        if not self._fused:
            return self._run_plainly(hidden_ND, packed, part, is_final)
        position = self.on_device(packed.source_N)[None]
        cos, sin = self.decoder.rotary_emb(hidden_ND[None], position)
        rows = Rows(*packed.sizes, hidden_ND)
        for layer in self._fused[part]:
            hidden_ND = layer(hidden_ND, (cos[0], sin[0]), rows)
        return self.decoder.norm(hidden_ND) if is_final else hidden_ND

    def _run_plainly(
        self, hidden_ND: Tensor, packed: Packed, part: slice, is_final: bool
    ) -> Tensor:
        with self._only(part, is_final):
            out = self.decoder(
                inputs_embeds=hidden_ND[None],
                attention_mask=self._mask(packed),
                position_ids=self.on_device(packed.source_N)[None],
                use_cache=False,
            )
        final: Tensor = out.last_hidden_state[0]
        return final

    @contextmanager
    def _only(self, part: slice, is_final: bool) -> Iterator[None]:
        norm, config = self.decoder.norm, self.decoder.config
        whole = config.num_hidden_layers
        self.decoder.layers = self._layers[part]
        self.decoder.norm = norm if is_final else nn.Identity()
        config.num_hidden_layers = len(self.decoder.layers)
        try:
            yield
        finally:
            self.decoder.layers, self.decoder.norm = self._layers, norm
            config.num_hidden_layers = whole


def _rows_of(hidden_ND: Tensor, packed: Packed) -> list[Tensor]:
    num_prefix, sizes = packed.sizes
    prefix, *rests = torch.split(hidden_ND, [num_prefix, *sizes])
    return [torch.cat([prefix, rest]) for rest in rests]


def _packed_of(trunks: Sequence[Tensor], packed: Packed) -> Tensor:
    row_N, source_N = torch.from_numpy(packed.row_N), torch.from_numpy(packed.source_N)
    prefix = trunks[0][source_N[row_N == -1]]
    return torch.cat([prefix, *(t[source_N[row_N == index]] for index, t in enumerate(trunks))])

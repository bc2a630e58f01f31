"""The frozen lower layers, run once for each row, and the trained upper ones.

A layer below the adapter gives the same activations in every epoch. They are kept in memory for the
round (0.16 MB for a row of 70 tokens at width 576), so an epoch costs only the layers that learn.
Models whose decoder is not `model.layers` between an embedding and `model.norm` run whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perennial.infra.errors import TrainingError
from perennial.training.batching import Packed, cut, pack
from perennial.training.fused import FusedLayer, Rows, can_fuse
from perennial.training.loss import PositionLosses, Targets, head_losses, plain_losses
from perennial.training.tokens import TokenRow

Kernels = Literal["fused", "plain"]

_SPLITTABLE = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class SplitModel:
    """A causal model cut at layer `num_frozen`: trunk below, top above.

    Packed rows and trunks come from the CPU, one copy of each a batch; what is computed stays on
    the model's device. `model` is the plain transformers model; adapters may be attached inside
    it. Kernels "fused" are used where the layers allow it.
    """

    def __init__(
        self,
        model: Any,  # Any: transformers
        num_frozen: int,
        kernels: Kernels = "plain",
    ) -> None:
        self.model = model
        self.decoder = model.model
        self.head: Any = model.get_output_embeddings()
        can_split = model.config.model_type in _SPLITTABLE
        self.num_frozen = num_frozen if can_split else 0
        self.device: torch.device = self.head.weight.device
        self.dtype: torch.dtype = self.head.weight.dtype
        self._layers = self.decoder.layers
        self._fused: list[FusedLayer] = []
        if kernels == "fused" and can_fuse(model):
            size = self._layers[0].self_attn.head_dim
            self._fused = [FusedLayer(layer, size) for layer in self._layers]

    def trunk(self, rows: Sequence[TokenRow], batch_tokens: int) -> list[Tensor]:
        """Input activations of the first trained layer for each row, (T, width), on the CPU."""
        kept: list[Tensor] = []
        for span in cut([row.num_tokens for row in rows], batch_tokens):
            part = [rows[i] for i in span]
            packed = pack(part, labels=["completion"] * len(part))
            with torch.no_grad():
                hidden_ND = self._run(self._embed(packed), packed, slice(0, self.num_frozen), False)
            kept += _rows_of(hidden_ND.cpu(), packed)
        return kept

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
        hidden_ND = self.hidden(packed, trunks)
        logits: Tensor = self.head(hidden_ND[self.on_device(packed.predict_M)])
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
        """Raise TrainingError unless the parts together give what the plain whole model gives."""
        packed = pack([row], labels=["completion"])
        with torch.no_grad():
            whole = SplitModel(self.model, 0).logits(packed, None)
            parts = self.logits(packed, self.trunk([row], row.num_tokens))
        gap = float((whole - parts).abs().max())
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        if not gap < tolerance * max(1.0, float(whole.abs().max())):
            raise TrainingError(
                f"trunk and kernels do not fit {self.model.config.model_type}: logits "
                f"differ by {gap:.2g}; set top_layers to the number of layers, kernels to 'plain'",
                gap=gap,
            )

    def _embed(self, packed: Packed) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(self.on_device(packed.ids_N))
        return embedded

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
        visible = self.on_device(packed.visible_NN)
        mask = hidden_ND.new_zeros(visible.shape)
        mask.masked_fill_(~visible, torch.finfo(hidden_ND.dtype).min)
        with self._only(part, is_final):
            out = self.decoder(
                inputs_embeds=hidden_ND[None],
                attention_mask=mask[None, None],
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

"""A plain PyTorch decoder and its training step, as a peer of ours: the same parameters, loss and update.

Written as one writes PyTorch: eager, `scaled_dot_product_attention`, cross entropy of all logits, fused AdamW over two
groups of parameters.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atlas.training import TrainConfig
from models import ModelConfig

VERSION = torch.__version__


class TorchDecoder(nn.Module):
    """Dense attention and a gated feed-forward on one norm a layer, tied embeddings, in float32.

    config: of family "atlas", dense.
    """

    def __init__(self, config: ModelConfig, window: int):
        super().__init__()
        V, M = config.vocab_size, config.d_model
        self.embedding = nn.Embedding(V, M)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        frequency_E = config.rope_base ** (-torch.arange(0, config.head_width, 2) / config.head_width)
        angle_TE = torch.arange(window)[:, None] * frequency_E
        self.register_buffer("cos", torch.cat([angle_TE.cos()] * 2, -1)[:, None], persistent=False)
        self.register_buffer("sin", torch.cat([-angle_TE.sin(), angle_TE.sin()], -1)[:, None], persistent=False)
        self.epsilon = config.architecture.norm_epsilon

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of int64 tokens [B, T]."""
        x_BTM = self.embedding(tokens_BT)
        for layer in self.layers:
            x_BTM = layer(x_BTM, self.cos, self.sin)
        return functional.rms_norm(x_BTM, x_BTM.shape[-1:], eps=self.epsilon) @ self.embedding.weight.T

    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Takes the parameters of our decoder, by dotted name with layers stacked."""
        with torch.no_grad():
            self.embedding.weight.copy_(torch.tensor(params["embedding"]))
            for i, layer in enumerate(self.layers):
                mine = {name.removeprefix("layers."): a[i] for name, a in params.items() if name.startswith("layers.")}
                layer.norm.weight.copy_(torch.tensor(mine["norm"]))
                for name, linear in layer.named_linears().items():
                    # Ours are [in, out], with heads apart; those of PyTorch [out, in].
                    inputs = linear.in_features
                    linear.weight.copy_(torch.tensor(mine[name]).reshape(inputs, -1).T)


class _Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        M, F, E = config.d_model, config.d_ff, config.head_width
        self.shape = (config.heads, config.kv_heads, E)
        wide, narrow = config.heads * E, config.kv_heads * E
        self.norm = nn.RMSNorm(M, eps=config.architecture.norm_epsilon)
        self.query, self.key, self.value = (nn.Linear(M, width, bias=False) for width in (wide, narrow, narrow))
        self.out = nn.Linear(wide, M, bias=False)
        self.gate, self.up = nn.Linear(M, F, bias=False), nn.Linear(M, F, bias=False)
        self.down = nn.Linear(F, M, bias=False)

    def forward(self, x_BTM: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        n_BTM, (H, G, E) = self.norm(x_BTM), self.shape
        q, k, v = (linear(n_BTM).unflatten(-1, (-1, E)) for linear in (self.query, self.key, self.value))
        q, k = (_rotate(a, cos, sin) for a in (q, k))
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        o_BTHE = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G).transpose(1, 2)
        return x_BTM + self.out(o_BTHE.flatten(2)) + self.down(functional.silu(self.gate(n_BTM)) * self.up(n_BTM))

    def named_linears(self) -> dict[str, nn.Linear]:
        """By the names of ours."""
        rooms = dict.fromkeys(("query", "key", "value", "out"), "attention")
        rooms |= dict.fromkeys(("gate", "up", "down"), "feed_forward")
        return {f"{room}.{name}": getattr(self, name) for name, room in rooms.items()}


def _rotate(x_BTHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x_BTHE * cos + x_BTHE.roll(x_BTHE.shape[-1] // 2, -1) * sin


class TorchTraining:
    """Trains a decoder from given parameters: `step` is one update, after which its loss is known."""

    def __init__(self, model: ModelConfig, config: TrainConfig, window: int, params: Mapping[str, np.ndarray]):
        torch.set_num_threads(1)
        self.decoder, self.config, self.steps = TorchDecoder(model, window), config, 0
        self.decoder.load(params)
        matrices = [p for p in self.decoder.parameters() if p.ndim > 1]
        vectors = [p for p in self.decoder.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)

    def step(self, tokens_BS: np.ndarray) -> float:
        """The loss, in nats a token, before an update on tokens int [B, T+1] at the warm-up's learning rate."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1, self.steps / self.config.warmup_steps)
        tokens_BS = torch.from_numpy(tokens_BS).long()
        logits_BTV = self.decoder(tokens_BS[:, :-1])
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BS[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.decoder.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return loss.item()

    def count(self) -> int:
        """Parameters."""
        return sum(p.numel() for p in self.decoder.parameters())

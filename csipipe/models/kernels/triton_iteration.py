"""CSILocal's whole iteration in one process on one GPU: UEs stacked, fused convolutions, one graph.

Shapes: U UEs, B rows of a UE's mini-batch, M micro-batches of R = B / M rows per UE, C code, A
angles, D delays; images are (…, 2, A, D), flat ones F = 2·A·D.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, nn

from csipipe.models.crblock import CRBlock
from csipipe.models.kernels import triton_backward, triton_crblock, triton_forward, triton_weights

SLOPE = 0.3


class SmallConv:
    """3×3 convolutions of two to two channels, `groups` kernels for the same number of images each."""

    def __init__(self, groups: int, images: int, a: int, d: int, device: torch.device) -> None:
        self.groups, self.images, self.a, self.d = groups, images, a, d
        self.count = triton.cdiv(a, 4) * d
        runs = min(256, triton.next_power_of_2(self.count))
        self.tiles = triton.cdiv(self.count, runs)
        self.runs = {"TILES": self.tiles, "RUNS": runs, "A": a, "D": d}
        block = min(1024, triton.next_power_of_2(a * d))
        self.block = {"TILES": triton.cdiv(a * d, block), "BLOCK": block, "A": a, "D": d}
        self.programs = groups * images * self.tiles
        self.none = torch.zeros(8, device=device)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, finish: bool, part: Tensor | None = None
    ) -> Tensor:
        """Output; with `finish` bias and LeakyReLU are applied, else its moments go to `part`."""
        out = torch.empty_like(x)
        triton_forward.conv_forward[(self.programs,)](
            x,
            self.none,
            weight,
            bias,
            out,
            self.none if part is None else part,
            self.programs,
            self.images,
            0,
            KH=3,
            KW=3,
            IN=2,
            OUT=2,
            x_channels=2,
            q_channels=2,
            stats_channels=2,
            ACTIVATE=False,
            FINISH=finish,
            TRAIN=part is not None,
            num_warps=4,
            **self.runs,
        )
        return out

    def input_gradient(self, y: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """Of a finished convolution."""
        dx = torch.empty_like(dy)
        triton_backward.conv_backward[(self.programs,)](
            dy,
            y,
            self.none,
            self.none,
            self.none,
            weight,
            self.none,
            self.none,
            dx,
            self.none,
            self.programs,
            0,
            KH=3,
            KW=3,
            IN=2,
            OUT=2,
            q_channels=2,
            stats_channels=2,
            before_channels=2,
            JOIN=False,
            NORM=False,
            ACTIVATE=False,
            ADD=False,
            num_warps=4,
            **self.runs,
        )
        return dx

    def weight_gradients(
        self, x: Tensor, q: Tensor, g: Tensor, stats: Tensor | None, coef: Tensor | None
    ) -> Tensor:
        """(groups, 36), or (groups, 38) with the bias's where no BatchNorm follows."""
        norm = stats is not None
        size = 36 if norm else 38
        programs = min(self.images, triton.cdiv(528, self.groups))
        part = torch.empty(self.groups * programs * size, device=x.device)
        triton_weights.conv_weights[(self.groups * programs,)](
            g,
            q,
            self.none if stats is None else stats,
            self.none if coef is None else coef,
            self.none,
            x,
            self.none,
            part,
            programs,
            self.images,
            0,
            A=self.a,
            D=self.d,
            KH=3,
            KW=3,
            IN=2,
            OUT=2,
            q_channels=2,
            stats_channels=2,
            x_channels=2,
            JOIN=False,
            NORM=norm,
            ACTIVATE=False,
            BIAS=not norm,
            ROWS=2,
            COLUMNS=128,
            num_warps=8,
        )
        out = torch.empty(self.groups, size, device=x.device)
        triton_weights.finish_weights[(triton.cdiv(size, 32), self.groups)](
            part, programs, out, SIZE=size, COLUMNS=32, ROWS=32
        )
        return out


class Iteration:
    """All parts' weights, stacked over UEs, and one iteration of CSILocal on them.

    Args:
        encoders, heads: of each UE, as `models.build_encoder` and `build_head` make them.
        tail: its layers.
        held: (U, rows, 2, A, D) every UE's rows, on the device.
        picks: (U, B) rows of the next mini-batches, on the device; the caller fills it.
    """

    def __init__(
        self,
        encoders: list[nn.Sequential],
        heads: list[nn.Sequential],
        tail: nn.Sequential,
        held: Tensor,
        picks: Tensor,
        micro_batches: int,
        dtype: torch.dtype,
    ) -> None:
        u, rows, _, a, d = held.shape
        self.u, self.b, self.m, self.dtype = u, picks.shape[1], micro_batches, dtype
        self.a, self.d, self.flat = a, d, 2 * a * d
        self.held, self.picks = held.flatten(2).flatten(0, 1), picks
        self.first = torch.arange(u, device=held.device)[:, None] * rows

        def stack(modules: list[nn.Sequential], place: int, name: str) -> Tensor:
            every = [getattr(m[place], name).detach() for m in modules]
            return torch.stack(every).to(held.device).contiguous()

        self.conv_w, self.conv_b = stack(encoders, 0, "weight"), stack(encoders, 0, "bias")
        self.gamma, self.beta = stack(encoders, 1, "weight"), stack(encoders, 1, "bias")
        self.mean, self.var = stack(encoders, 1, "running_mean"), stack(encoders, 1, "running_var")
        self.batches = stack(encoders, 1, "num_batches_tracked")
        self.enc_w, self.enc_b = stack(encoders, 4, "weight"), stack(encoders, 4, "bias")
        self.head_w, self.head_b = stack(heads, 0, "weight"), stack(heads, 0, "bias")
        self.tail = tail
        self.blocks: list[CRBlock] = [m for m in tail if isinstance(m, CRBlock)]
        self.enter: Any = tail[0]
        self.tail_conv: Any = tail[2]
        self.leave: Any = tail[7]
        self.parameters = [
            self.conv_w,
            self.gamma,
            self.beta,
            self.enc_w,
            self.enc_b,
            self.head_w,
            self.head_b,
            *self.tail.parameters(),
        ]
        for p in self.parameters:
            p.requires_grad_()
        self.encoder_conv = SmallConv(u, self.b, a, d, held.device)
        self.tail_small = SmallConv(1, u * self.b // self.m, a, d, held.device)
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3, fused=True, capturable=True)
        self.loss = torch.zeros(u, self.b, device=held.device)

    def step(self) -> None:
        """One iteration, weights changed."""
        with torch.no_grad():
            self.gradients()
            self.optimizer.step()

    def gradients(self) -> None:
        """Everything but the optimiser's step."""
        h = self.draw()
        z = self.encode(h)
        saved = self.tail_forward(z)
        do = self.heads(h, torch.cat([s[-1].view(self.u, -1, s[-1].shape[1]) for s in saved], 1))
        dz = self.tail_backward(saved, do)
        self.encode_backward(dz)

    def draw(self) -> Tensor:
        """(U·B, F)."""
        return self.held.index_select(0, (self.picks + self.first).flatten())

    def encode(self, h: Tensor) -> Tensor:
        """(U, B, C)."""
        conv, u = self.encoder_conv, self.u
        x = h.view(-1, 2, self.a, self.d).to(self.dtype)
        part = torch.empty(5 * conv.programs, device=h.device)
        q = conv.forward(x, self.conv_w, self.conv_b, False, part)
        stats = torch.empty(u, 4, 2, device=h.device)
        triton_forward.finish_forward[(2, u)](
            part,
            conv.programs // u,
            conv.programs,
            self.gamma,
            self.beta,
            self.mean,
            self.var,
            self.batches,
            stats,
            self.b * self.a * self.d,
            C=2,
            stats_channels=2,
            MOMENTUM=0.1,
            EPS=1e-5,
            TRAIN=True,
            CHUNK=1024,
            num_warps=8,
        )
        out = torch.empty_like(q)
        self._activate(q, stats, q, out, part, False)
        flat = out.view(u, self.b, self.flat)
        self.kept = (x, q, stats, flat)
        w, b = self.enc_w.to(self.dtype), self.enc_b.to(self.dtype)
        return torch.baddbmm(b[:, None], flat, w.mT)

    def _activate(
        self, q: Tensor, stats: Tensor, g: Tensor, out: Tensor, part: Tensor, backward: bool
    ) -> None:
        block = self.encoder_conv.block
        programs = len(q) * block["TILES"]
        triton_backward.activate[(programs,)](
            q, stats, g, out, part, programs, self.b, BACKWARD=backward, **block
        )

    def tail_forward(self, z: Tensor) -> list[tuple[Any, ...]]:
        """What the way back needs of each micro-batch; last its output (U·R, C)."""
        rows = self.b // self.m
        w, b = self.enter.weight.to(self.dtype), self.enter.bias.to(self.dtype)
        w2, b2 = self.leave.weight.to(self.dtype), self.leave.bias.to(self.dtype)
        found = []
        for m in range(self.m):
            zm = z[:, m * rows : (m + 1) * rows].reshape(self.u * rows, -1)
            x = torch.addmm(b, zm, w.t()).view(-1, 2, self.a, self.d)
            y0 = self.tail_small.forward(x, self.tail_conv.weight, self.tail_conv.bias, True)
            y1, saved1 = triton_crblock.forward(self.blocks[0], y0, True)
            y2, saved2 = triton_crblock.forward(self.blocks[1], y1, True)
            y = y2.flatten(1)
            found.append((zm, x, y0, saved1, saved2, y, torch.addmm(b2, y, w2.t())))
        return found

    def heads(self, h: Tensor, o: Tensor) -> Tensor:
        """Losses, the heads' gradients, and the gradient at their input (U, B, C)."""
        w, b = self.head_w.to(self.dtype), self.head_b.to(self.dtype)
        s = torch.baddbmm(b[:, None], o, w.mT).float()
        h = h.view_as(s)
        off = torch.nn.functional.hardsigmoid(s).sub_(h)
        energy = h.square().sum(2)
        torch.div(off.square().sum(2), energy, out=self.loss)
        ds = off.mul_((2 / 6 / self.b) / energy[:, :, None])
        ds = torch.where(s.abs() < 3, ds, 0.0).to(self.dtype)
        self.head_w.grad = torch.bmm(ds.mT, o).float()
        self.head_b.grad = ds.float().sum(1)
        return torch.bmm(ds, w)

    def tail_backward(self, saved: list[tuple[Any, ...]], do: Tensor) -> Tensor:
        """Gradients of the tail, and at its input (U, B, C)."""
        rows = self.b // self.m
        w, w2 = self.enter.weight.to(self.dtype), self.leave.weight.to(self.dtype)
        dz, total = [], None
        for m in range(self.m):
            zm, x, y0, saved1, saved2, y, _ = saved[m]
            dom = do[:, m * rows : (m + 1) * rows].reshape(self.u * rows, -1)
            dy = (dom @ w2).view_as(x)
            d1, rest2 = triton_crblock.input_gradient(self.blocks[1], saved2, dy)
            d0, rest1 = triton_crblock.input_gradient(self.blocks[0], saved1, d1)
            dx = self.tail_small.input_gradient(y0, d0, self.tail_conv.weight).flatten(1)
            dz.append((dx @ w).view(self.u, rows, -1))
            conv = self.tail_small.weight_gradients(x, y0, d0, None, None)[0]
            some = [
                (dx.t() @ zm).float(),
                dx.float().sum(0),
                conv[:36].view(2, 2, 3, 3),
                conv[36:],
                *triton_crblock.weight_gradients(self.blocks[0], saved1, rest1),
                *triton_crblock.weight_gradients(self.blocks[1], saved2, rest2),
                (dom.t() @ y).float(),
                dom.float().sum(0),
            ]
            total = some if total is None else torch._foreach_add(total, some)
        assert total is not None
        for p, g in zip(self.tail.parameters(), total, strict=True):
            p.grad = g
        return torch.cat(dz, 1)

    def encode_backward(self, dz: Tensor) -> None:
        """The encoders' gradients. That of the bias before BatchNorm is zero, so it stays."""
        x, q, stats, flat = self.kept
        conv, u = self.encoder_conv, self.u
        self.enc_w.grad = torch.bmm(dz.mT, flat).float()
        self.enc_b.grad = dz.float().sum(1)
        da = torch.bmm(dz, self.enc_w.to(self.dtype)).view_as(q)
        g = torch.empty_like(q)
        tiles = conv.block["TILES"]
        part = torch.empty(4 * len(q) * tiles, device=q.device)
        self._activate(q, stats, da, g, part, True)
        coef = torch.empty(u, 2, 2, device=q.device)
        dgamma, dbeta = torch.empty_like(self.gamma), torch.empty_like(self.beta)
        triton_backward.finish_backward[(2, u)](
            part,
            self.b * tiles,
            len(q) * tiles,
            stats,
            coef,
            dgamma,
            dbeta,
            part,
            self.b * self.a * self.d,
            C=2,
            EXTRA=0,
            TRAIN=True,
            CHUNK=1024,
            num_warps=8,
        )
        self.gamma.grad, self.beta.grad = dgamma, dbeta
        self.conv_w.grad = conv.weight_gradients(x, q, g, stats, coef).view_as(self.conv_w)

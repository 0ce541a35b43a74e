"""CSILocal's whole iteration in one process on one GPU: what one process can reach.

Not a method of the program: no wire, no other process, no method's order of messages. All UEs'
encoders and heads are stacked, the convolutions are the program's fused kernels, and the whole
iteration, Adam included, can be captured as one CUDA graph.

Shapes: U UEs, B rows of a UE's mini-batch, M micro-batches of R = B / M rows per UE, C code, A
angles, D delays; images are (…, 2, A, D), flat ones F = 2·A·D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from csipipe.models.crblock import CRBlock
from csipipe.models.kernels.triton import crblock, host, norm, pointwise


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
        self.stacked = host.Tiles(u * self.b, a, d, u)
        self.tiles = host.Tiles(u * self.b // self.m, a, d)
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
        u, programs = self.u, self.stacked.down[0]
        x = h.view(-1, 2, self.a, self.d).to(self.dtype)
        part, q = self.stacked.sums(5, h.device), torch.empty_like(x)
        host.forward(self.stacked, x, self.conv_w, q, bias=self.conv_b, part=part)
        stats = torch.empty(u, 4, 2, device=h.device)
        norm.finish_forward[(2, u)](
            part,
            programs // u,
            programs,
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
        programs = self.stacked.programs
        pointwise.activate[(programs,)](
            q, stats, g, out, part, programs, self.b, BACKWARD=backward, **self.stacked.block
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
            conv, y0 = self.tail_conv, torch.empty_like(x)
            host.forward(self.tiles, x, conv.weight, y0, bias=conv.bias, leaky=True)
            y1, saved1 = crblock.forward(self.blocks[0], y0, True)
            y2, saved2 = crblock.forward(self.blocks[1], y1, True)
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
        dz: list[Tensor] = []
        total: Any = None
        for m in range(self.m):
            zm, x, y0, saved1, saved2, y, _ = saved[m]
            dom = do[:, m * rows : (m + 1) * rows].reshape(self.u * rows, -1)
            dy = (dom @ w2).view_as(x)
            d1, rest2 = crblock.input_gradient(self.blocks[1], saved2, dy)
            d0, rest1 = crblock.input_gradient(self.blocks[0], saved1, d1)
            gradient, weight = host.Gradient(d0, y0, leaky=True), self.tail_conv.weight
            dx = torch.empty_like(x)
            host.backward(self.tiles, gradient, weight, dx)
            dx = dx.flatten(1)
            dz.append((dx @ w).view(self.u, rows, -1))
            (conv,) = host.weight_gradients(self.tiles, gradient, weight, x, bias=True)
            some = [
                (dx.t() @ zm).float(),
                dx.float().sum(0),
                conv[:36].view(2, 2, 3, 3),
                conv[36:],
                *crblock.weight_gradients(self.blocks[0], saved1, rest1),
                *crblock.weight_gradients(self.blocks[1], saved2, rest2),
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
        u, tiles = self.u, self.stacked
        self.enc_w.grad = torch.bmm(dz.mT, flat).float()
        self.enc_b.grad = dz.float().sum(1)
        da = torch.bmm(dz, self.enc_w.to(self.dtype)).view_as(q)
        g = torch.empty_like(q)
        part = tiles.sums(4, q.device)
        self._activate(q, stats, da, g, part, True)
        coef = torch.empty(u, 2, 2, device=q.device)
        dgamma, dbeta = torch.empty_like(self.gamma), torch.empty_like(self.beta)
        norm.finish_backward[(2, u)](
            part,
            tiles.programs // u,
            tiles.programs,
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
        gradient = host.Gradient(g, q, stats, coef)
        of_conv = host.weight_gradients(tiles, gradient, self.conv_w, x)
        self.conv_w.grad = of_conv.view_as(self.conv_w)

"""For `kernels benchmark`: the op beside plain PyTorch, which gets its noise drawn before the clock starts.

So the reference is a layer's product with a weight to which eps is added, and no more than that.
"""

import torch
from kernels.benchmark import Benchmark


class FlatLora(Benchmark):
    seed = 0

    def setup(self):
        on_cpu = self.device == "cpu"
        M, N, K, r = (64, 512, 384, 16) if on_cpu else (2048, 4096, 4096, 16)
        dtype = torch.float32 if on_cpu else torch.bfloat16
        made = {"device": self.device, "dtype": dtype}
        # Results of about 0.1, so that the fixed tolerance of 0.01 is above bfloat16's rounding; and eps as strong as
        # W, so that it is below the noise. How strong eps is does not change the time.
        self.x = torch.randn(M, K, **made).requires_grad_()
        self.weight = torch.randn(N, K, **made) * (0.1 / K**0.5)
        self.lora_A = (torch.randn(r, K, device=self.device) / K**0.5).requires_grad_()
        self.lora_B = (torch.randn(N, r, device=self.device) * 0.01).requires_grad_()
        self.dy = torch.randn(M, N, **made)
        self.noise_scale = self.kernel.flat_noise_scale(
            self.weight, self.lora_A, self.lora_B, scaling=2.0, sigma=1.0
        )
        self.eps = {
            noise: self.kernel.materialize_noise(
                self.noise_scale, K, seed=7, stream=3, noise=noise, dtype=dtype, backend="reference"
            )
            for noise in ("gaussian", "rademacher")
        }

    def _forward(self, noise):
        return self.kernel.fused_flat_lora_linear(
            self.x, self.weight, self.lora_A, self.lora_B,
            scaling=2.0, noise_scale=self.noise_scale, seed=7, stream=3, noise=noise,
        )  # fmt: skip

    def _plain(self, noise):
        A, B = (t.to(self.x.dtype) for t in (self.lora_A, self.lora_B))
        return self.x @ (self.weight + self.eps[noise]).t() + 2.0 * (self.x @ A.t()) @ B.t()

    def _grads(self, y):
        """dX, dA and dB in one tensor; the last two, which are longer sums, made as small as the first."""
        dx, *grads = torch.autograd.grad(y, (self.x, self.lora_A, self.lora_B), self.dy)
        return torch.cat([dx.float().flatten(), *(1e-3 * g.flatten() for g in grads)])

    def benchmark_gaussian(self):
        with torch.no_grad():
            self.out = self._forward("gaussian")

    def verify_gaussian(self):
        with torch.no_grad():
            return self._plain("gaussian")

    def benchmark_rademacher(self):
        with torch.no_grad():
            self.out = self._forward("rademacher")

    def verify_rademacher(self):
        with torch.no_grad():
            return self._plain("rademacher")

    def benchmark_gaussian_and_backward(self):
        self.out = self._grads(self._forward("gaussian"))

    def verify_gaussian_and_backward(self):
        return self._grads(self._plain("gaussian"))

"""Time and memory of the log-prob kernel, forward and backward, against the three matmuls that nothing can do without.

    python benchmarks/logp_kernel.py                                             # CPU, fp32
    python benchmarks/logp_kernel.py --device cuda --dtype bfloat16 --shapes 8192,2048,128256
"""

import argparse

import torch
import torch.nn.functional as F
from common import describe_machine, peak_extra_memory, print_table, time_interleaved

from logps import linear_logps


def candidates(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> dict:
    n, v = len(hidden), len(weight)
    logits = hidden.new_empty(n, v) if hidden.is_cuda else hidden.new_empty(v, n).T  # whichever is faster
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def three_matmuls():
        with torch.no_grad():
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.T, hidden, out=grad_weight)

    def differentiated(loss):
        def run():
            hidden.grad = weight.grad = None
            loss().backward()
        return run

    def naive():
        return -(hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None]).sum()

    runs = {"three matmuls (the limit)": three_matmuls,
            "linear_logps, uniform": differentiated(lambda: -linear_logps(hidden, weight, labels, uniform=True).sum()),
            "linear_logps, uniform, fused": differentiated(
                lambda: -linear_logps(hidden, weight, labels, uniform=True, fuse=True).sum()),
            "linear_logps, any weights": differentiated(lambda: -linear_logps(hidden, weight, labels).sum()),
            "naive log_softmax + gather": differentiated(naive),
            "F.cross_entropy": differentiated(lambda: F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum"))}
    if hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        runs["F.linear_cross_entropy, chunked"] = differentiated(
            lambda: F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=chunked))
    return runs


def compare(n: int, h: int, v: int, device: str, dtype: torch.dtype, repeats: int) -> None:
    """Prints a table of the candidates for n hidden states of h numbers, and a vocabulary of v."""
    hidden = torch.randn(n, h, device=device, dtype=dtype, requires_grad=True)
    weight = (0.02 * torch.randn(v, h, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,), device=device)
    runs, extra = candidates(hidden, weight, labels), {}
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    for name, run in [*runs.items()]:
        try:
            run()  # compiles
        except Exception as error:  # one of torch's own may not take the shape
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
            del runs[name]
            continue
        hidden.grad = weight.grad = None
        extra[name] = peak_extra_memory(run, device) - (0 if "limit" in name else gradients)
    seconds = time_interleaved(runs, repeats, device)
    limit = seconds["three matmuls (the limit)"]
    print(f"\nN {n}, H {h}, V {v}: the limit is {limit * 1e3:.2f} ms = {6 * n * h * v / limit / 1e12:.3g} TFLOP/s")
    naive = extra.get("naive log_softmax + gather")
    print_table(["forward + backward", "ms", "time / limit", "extra memory, MB", "of naive's"],
                [[name, f"{seconds[name] * 1e3:.2f}", f"{seconds[name] / limit:.2f}", f"{extra[name] / 1e6:.0f}",
                  f"{extra[name] / naive:.2f}" if naive else ""] for name in runs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", default=["2048,576,49152", "1000,576,49152", "1024,1024,128256"], help="N,H,V")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(describe_machine(args.device, dtype))
    for shape in args.shapes:
        compare(*map(int, shape.split(",")), args.device, dtype, args.repeats)


if __name__ == "__main__":
    main()

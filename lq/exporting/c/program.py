"""A network in C, compiled and run from Python: what it prints is compared with everything else."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.functional.hard import quantize
from lq.functional.points import nearest_point

__all__ = ["CProgram"]

_SAID = {"type", "shape", "scale", "lo", "hi", "points", "exponent", "flash", "ram", "outputs"}
_TYPES = {"int8_t": torch.int8, "uint8_t": torch.uint8, "int16_t": torch.int16}


class CProgram:
    """What `write_c` wrote, as a function of images.

    Args:
        path: of the C file, which is compiled, or of a program that was compiled from one.
        compiler: command of the C compiler.

    Raises:
        FileNotFoundError: without the file or the compiler.
        ValueError: for a file that does not compile, or a program of another kind.
    """

    def __init__(self, path: str | Path, compiler: str = "cc") -> None:
        """Compile, and ask the program what it takes."""
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"path must be a C file or a program, got {str(path)!r} which does not exist")
        self._folder = tempfile.TemporaryDirectory()
        self.program = self._compile(compiler) if self.path.suffix == ".c" else self.path.resolve()
        said = self._run("--input")
        try:
            self.input: dict[str, Any] = json.loads(said.stdout)
            if not _SAID <= self.input.keys():
                raise KeyError(sorted(_SAID - self.input.keys()))
            self._type, self.shape = _TYPES[self.input["type"]], tuple(self.input["shape"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path must be a program made by lq export target=c, got {str(path)!r}") from error
        self.seconds = 0.0

    def encode(self, x: Tensor) -> Tensor:
        """Input codes of real inputs.

        Args:
            x: ``(N, C, H, W)``.

        Returns:
            Codes, shape of ``x``, in the type that the program reads.
        """
        scale = torch.tensor(self.input["scale"], dtype=torch.float32)
        if self.input["points"] is None:
            return quantize(x, scale, lo=self.input["lo"], hi=self.input["hi"]).to(self._type)
        points = torch.tensor(self.input["points"], dtype=torch.float32)
        return nearest_point((x / scale).reshape(1, -1), points).reshape(x.shape).to(self._type)

    def run(self, codes: Tensor) -> Tensor:
        """Integer logits of input codes.

        Args:
            codes: from `encode`.

        Returns:
            int64 ``(N, classes)``.

        Raises:
            ValueError: for images of another shape.
        """
        if tuple(codes.shape[1:]) != self.shape:
            raise ValueError(f"codes must have shape (N, {', '.join(map(str, self.shape))}), got {tuple(codes.shape)}")
        if not len(codes):
            return torch.zeros(0, self.input["outputs"], dtype=torch.int64)
        images = Path(self._folder.name) / "images.bin"
        images.write_bytes(codes.to(self._type).contiguous().numpy().tobytes())
        done = self._run(str(images))
        self.seconds += float(done.stderr.rsplit(",", 1)[1].split()[0]) * 1e-6 * len(codes)
        return torch.tensor([[int(v) for v in line.split()] for line in done.stdout.splitlines()])

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of real inputs, float64 ``(N, classes)``."""
        return torch.ldexp(self.run(self.encode(x)).double(), torch.tensor(-self.input["exponent"]))

    def _compile(self, compiler: str) -> Path:
        found = shutil.which(compiler)
        if found is None:
            raise FileNotFoundError(f"compiler must be a command, got {compiler!r}: install a C compiler, such as gcc")
        program = Path(self._folder.name) / "network"
        built = subprocess.run(
            [found, "-O2", str(self.path.resolve()), "-o", str(program)], capture_output=True, text=True
        )
        if built.returncode:
            raise ValueError(f"{self.path} does not compile: {built.stderr.strip()[:500]}")
        return program

    def _run(self, argument: str) -> subprocess.CompletedProcess[str]:
        try:
            done = subprocess.run([str(self.program), argument], capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"{self.path} must be a program, it does not run: {error}") from error
        if done.returncode:
            raise ValueError(f"{self.path} must be made by lq export target=c, it failed: {done.stderr.strip()[:500]}")
        return done

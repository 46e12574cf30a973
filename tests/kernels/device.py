"""Where kernel tests run: on the card where there is one, else interpreted on the CPU."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

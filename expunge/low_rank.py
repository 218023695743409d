"""The nearest matrix of a lower rank, of a product that is never multiplied out."""

import torch
from torch import Tensor


def nearest(P: Tensor, Q: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B (O, rank), A (rank, I) with B A nearest to P Q, and ‖P Q − B A‖ / ‖P Q‖.

    By the singular values of the small matrix between two orthogonal bases (Eckart and Young,
    1936), so that P (O, N) and Q (N, I) cost the same for any width. A product of lower rank than
    asked for is filled up with zeros.
    """
    left, R = torch.linalg.qr(P.double())
    right, S = torch.linalg.qr(Q.double().T)
    U, σ, V = torch.linalg.svd(R @ S.T, full_matrices=False)
    r = min(rank, len(σ))
    root = σ[:r].sqrt()
    B, A = left @ U[:, :r] * root, root[:, None] * (V[:r] @ right.T)
    lost = σ[r:].square().sum().sqrt() / σ.square().sum().sqrt().clamp(min=1e-300)
    if r < rank:
        B = torch.cat([B, B.new_zeros(len(B), rank - r)], 1)
        A = torch.cat([A, A.new_zeros(rank - r, A.shape[1])])
    return B, A, float(lost)

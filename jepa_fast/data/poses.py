"""Poses of a robot's hand [..., 7]: position (3), extrinsic xyz Euler angles (3, radians), gripper opening (1).

Closed forms on whole batches and any device, in float64 inside: no loop over samples.
"""

import torch
from torch import Tensor


def rotation_matrix(angles: Tensor) -> Tensor:
    """Extrinsic xyz Euler angles [..., 3] -> Rz Ry Rx [..., 3, 3]."""
    (ca, cb, cc), (sa, sb, sc) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    rows = [cb * cc, sa * sb * cc - ca * sc, ca * sb * cc + sa * sc,
            cb * sc, sa * sb * sc + ca * cc, ca * sb * sc - sa * cc,
            -sb, sa * cb, ca * cb]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def euler_angles(rotation: Tensor) -> Tensor:
    """The inverse of `rotation_matrix`: [..., 3, 3] -> [..., 3], the second angle in [-pi / 2, pi / 2].

    Where it is +-pi / 2 the other two turn about one axis (gimbal lock), and the third is taken as 0.
    """
    r = rotation
    cos_b = torch.hypot(r[..., 0, 0], r[..., 1, 0])
    is_locked = cos_b < 1e-7
    a = torch.where(is_locked, torch.atan2(-r[..., 1, 2], r[..., 1, 1]), torch.atan2(r[..., 2, 1], r[..., 2, 2]))
    c = torch.where(is_locked, 0.0, torch.atan2(r[..., 1, 0], r[..., 0, 0]))
    return torch.stack([a, torch.atan2(-r[..., 2, 0], cos_b), c], -1)


def move_pose(pose: Tensor, action: Tensor) -> Tensor:
    """The pose after an action, both [..., 7]: positions add, the action's rotation follows the pose's, and the gripper
    adds up to at most 1 and at least 0.  V-JEPA 2-AC, arXiv:2506.09985, section 3."""
    p, a = pose.double(), action.double()
    rotation = rotation_matrix(a[..., 3:6]) @ rotation_matrix(p[..., 3:6])
    moved = torch.cat([p[..., :3] + a[..., :3], euler_angles(rotation), (p[..., 6:] + a[..., 6:]).clamp(0, 1)], -1)
    return moved.to(torch.promote_types(pose.dtype, action.dtype))


def pose_difference(start: Tensor, end: Tensor) -> Tensor:
    """The action that leads from one pose to another, both [..., 7]: differences, and the angles of R_end R_start^T."""
    s, e = start.double(), end.double()
    rotation = rotation_matrix(e[..., 3:6]) @ rotation_matrix(s[..., 3:6]).mT
    difference = torch.cat([e[..., :3] - s[..., :3], euler_angles(rotation), e[..., 6:] - s[..., 6:]], -1)
    return difference.to(torch.promote_types(start.dtype, end.dtype))

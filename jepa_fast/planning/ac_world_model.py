"""V-JEPA 2-AC as a world model for planners: the cost of action sequences is the distance of the last frame to the goal."""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..data.poses import move_pose
from ..models.ac_predictor import ACPredictor
from ..objectives.action_conditioned import normalise


class ACWorldModel:
    """Rolls an AC predictor out for E episodes x S samples at once; every frame is computed once, keys and values kept.

    chunk_size: sequences that are rolled out together, which bounds memory (0: all); kept keys and values take
    depth * 2 * embed_dim numbers per token.
    """

    def __init__(self, predictor: ACPredictor, chunk_size: int = 0):
        if chunk_size < 0:
            raise ValueError(f"chunk_size must be at least 0, got {chunk_size}")
        self.predictor, self.chunk_size = predictor, chunk_size

    def cost(self, frames: Tensor, poses: Tensor, goal: Tensor) -> Callable[[Tensor], Tensor]:
        """frames [E, 1, n, D], layer-normalised tokens of the current frame, poses [E, 1, 7], goal [E, 1, n, D] -> a
        function of actions [E, S, H, 7] -> [E, S]: the mean absolute difference of the last predicted frame and the goal.
        """
        if frames.dim() != 4 or frames.shape[1] != 1 or goal.shape != frames.shape:
            raise ValueError("frames and goal must be [E, 1, n, D] of one shape, "
                             f"got {list(frames.shape)} and {list(goal.shape)}")
        if poses.shape != (len(frames), 1, 7):
            raise ValueError(f"poses must be [E, 1, 7] = {[len(frames), 1, 7]}, got {list(poses.shape)}")

        def cost(actions: Tensor) -> Tensor:
            if actions.dim() != 4 or actions.shape[0] != len(frames) or actions.shape[3] != 7:
                raise ValueError(f"actions must be [E, S, H, 7] with E = {len(frames)}, got {list(actions.shape)}")
            E, S = actions.shape[:2]
            episode = torch.arange(E, device=actions.device).repeat_interleave(S)
            parts = zip(*(t.split(self.chunk_size or E * S) for t in (episode, actions.flatten(0, 1))), strict=True)
            # only the last frame of a rollout is held
            last = (deque(self.rollout(frames[e], poses[e], a), maxlen=1).pop() - goal[e] for e, a in parts)
            return torch.cat([difference.abs().mean((1, 2, 3)) for difference in last]).view(E, S)
        return cost

    def rollout(self, frame: Tensor, pose: Tensor, actions: Tensor) -> Iterator[Tensor]:
        """frame [B, 1, n, D], pose [B, 1, 7], actions [B, H, 7] -> the frame after each action [B, 1, n, D]."""
        kept = None
        for h in range(actions.shape[1]):
            action = actions[:, h:h + 1]
            frame, kept = self.predictor.extend(frame, action, pose, kept=kept)
            frame, pose = normalise(frame), move_pose(pose, action)
            yield frame

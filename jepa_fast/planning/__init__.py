"""Planning: sequences of actions of low cost under a world model, for many episodes at once.

    def cost(actions):                # [E, S, H, A]: E episodes, S samples, H steps, A action dimensions
        ...                           # roll the model out, compare with the goal
        return distance               # [E, S], lower is better

    plan = CEM.eb_jepa().plan(cost, num_episodes=20, action_dim=2, seed=0, step=t, device="cuda")
    plan.actions, plan.cost           # [E, H, A] and what they cost [E]

`world_models.GoalCost` is such a cost of a trained world model, `closed_loop.run_episodes` plans until goals are reached.

CEM              cross-entropy method              CEM.eb_jepa(), CEM.leworldmodel()
MPPI             weights by the cost               MPPI.eb_jepa(), MPPI.stable_worldmodel()
ICEM             smooth noise, elites stay         ICEM.stable_worldmodel()
GradientPlanner  AdamW through the model           GradientPlanner.leworldmodel()
CEMAC            V-JEPA 2-AC's, in 4 of 7 dims     CEMAC.vjepa2_ac()

ACWorldModel(predictor).cost(frames, poses, goal) is the cost of V-JEPA 2-AC; CEMAC plans with it.

Presets take changes: CEM.eb_jepa(horizon=40). `plan(mean=...)` starts from an earlier plan. Noise depends on (seed, step,
number of the episode) alone, so episodes planned together, or some of them alone (`first_episode`), come out equal.
Nothing inside an iteration waits for the device.
"""

from ._common import Cost, Plan
from .ac_world_model import ACWorldModel
from .cem import CEM
from .cem_ac import CEMAC
from .gradient import GradientPlanner
from .icem import ICEM
from .mppi import MPPI

__all__ = ["CEM", "CEMAC", "ICEM", "MPPI", "ACWorldModel", "Cost", "GradientPlanner", "Plan"]

"""Published objectives by name, each with its paper; KL and entropy are 0 in all of them."""

from __future__ import annotations

from .config import PRESETS, LossConfig, Preset
from .surrogates import Cispo, Clip, DppoKL, DppoTV, Dro, Gmpo, Reinforce, Sapo, Vespo

_CLIP = Clip(0.2, 0.2)
PRESETS |= {
    "reinforce": Preset(
        LossConfig(Reinforce(), aggregation="sequence_sum"),
        "Williams 1992, Machine Learning 8",
        "no KL; advantages with a baseline",
    ),
    "ppo": Preset(
        LossConfig(_CLIP, aggregation="token_mean"),
        "Schulman et al. 2017, arXiv:1707.06347",
        "clip 0.2; GAE advantages; for language models KL in the reward (InstructGPT: 0.02)",
    ),
    "grpo": Preset(
        LossConfig(_CLIP, aggregation="sequence_mean"),
        "Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300",
        "k3 KL with coefficient 0.04; clip 0.2; advantages: group mean and std",
    ),
    "dapo": Preset(
        LossConfig(Clip(0.2, 0.28), aggregation="token_mean"),
        "Yu et al. 2025 (DAPO), arXiv:2503.14476, token mean over the whole batch as trainers compute it",
        "no KL; clip 0.2 / 0.28; soft over-long penalty; dynamic sampling",
    ),
    "dapo_paper": Preset(
        LossConfig(Clip(0.2, 0.28), aggregation="group_mean"),
        "Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 8: token mean inside each group",
        "no KL; clip 0.2 / 0.28; group_size 16 (give it: preset('dapo_paper', group_size=16))",
    ),
    "dr_grpo": Preset(
        LossConfig(_CLIP, aggregation="constant"),
        "Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783",
        "no KL; centred advantages without std; constant_length = the longest completion (give it)",
    ),
    "bnpo": Preset(
        LossConfig(_CLIP, aggregation="token_mean"),
        "Xiao et al. 2025 (BNPO), arXiv:2506.02864, as TRL's loss_type='bnpo' aggregates it",
        "clip 0.2; token mean over the local batch",
    ),
    "gspo": Preset(
        LossConfig(Clip(3e-4, 4e-4), level="sequence", aggregation="sequence_mean"),
        "Zheng et al. 2025 (GSPO), arXiv:2507.18071",
        "no KL; clip 3e-4 / 4e-4 on the length-normalised sequence ratio",
    ),
    "luspo": Preset(
        LossConfig(Clip(3e-4, 4e-4), level="sequence", aggregation="sequence_sum"),
        "Liu et al. 2026 (LUSPO), arXiv:2602.05261",
        "GSPO times the sequence's length; no KL",
    ),
    "gmpo": Preset(
        LossConfig(Gmpo(0.4, 0.4), level="sequence", aggregation="sequence_mean"),
        "Zhao et al. 2025 (GMPO), arXiv:2507.20673",
        "log-ratios clipped at 0.4 token by token",
    ),
    "rloo": Preset(
        LossConfig(_CLIP, level="sequence_product", aggregation="sequence_mean"),
        "Ahmadian et al. 2024 (RLOO), arXiv:2402.14740, as TRL's RLOOTrainer clips it",
        "leave-one-out advantages (advantages.leave_one_out); KL in the reward",
    ),
    "gpg": Preset(
        LossConfig(Reinforce(), aggregation="token_mean"),
        "Chu et al. 2025 (GPG), arXiv:2504.02546",
        "no KL; advantages centred in the group",
    ),
    "cispo": Preset(
        LossConfig(Cispo(cap=5.0), aggregation="token_mean"),
        "MiniMax 2025 (MiniMax-M1), arXiv:2506.13585; cap: Khatri et al. 2025 (ScaleRL), arXiv:2510.13786",
        "no KL; upper bound only (ScaleRL: 5)",
    ),
    "sapo": Preset(
        LossConfig(Sapo(1.0, 1.05), aggregation="sequence_mean"),
        "Gao et al. 2025 (SAPO), arXiv:2511.20347",
        "tau 1.0 / 1.05",
    ),
    "vespo": Preset(
        LossConfig(Vespo(), level="sequence_product", aggregation="token_mean"),
        "Shen et al. 2026 (VESPO), arXiv:2602.10693",
        "k 2 / 3, lambda 3 / 2 by the advantage's sign",
    ),
    "dppo_tv": Preset(
        LossConfig(DppoTV(0.2, 0.2, cap=20.0), aggregation="token_mean"),
        "Qi et al. 2026 (DPPO), arXiv:2602.04879, with the truncated ratio of verl",
        "threshold 0.2 (verl's default); ratio truncated at 20 (verl's code; its configuration sets 3)",
    ),
    "dppo_kl": Preset(
        LossConfig(DppoKL(0.2, 0.2, cap=20.0), aggregation="token_mean"),
        "Qi et al. 2026 (DPPO), arXiv:2602.04879, with the truncated ratio of verl",
        "threshold 0.2 (verl's default); ratio truncated at 20 (verl's code; its configuration sets 3)",
    ),
    "prime": Preset(
        LossConfig(DppoTV(0.2, 0.2), aggregation="token_mean"),
        "prime-rl's default loss, 2026",
        "compared with the sampler: old_log_probs=rollout_log_probs, rollout_kl=KL(2e-3, 'k2')",
    ),
    "intellect2": Preset(
        LossConfig(Clip(0.2, 0.2, dual=4.0), aggregation="token_mean"),
        "Prime Intellect 2025 (INTELLECT-2), arXiv:2505.07291",
        "two-sided clip at 4; k3 KL with coefficient 0.001",
    ),
    "dro": Preset(
        LossConfig(Dro(beta=0.1), aggregation="token_mean"),
        "Richemond et al. 2024 (DRO), arXiv:2405.19107, as verl has it",
        "beta is to be chosen: preset('dro', surrogate=Dro(beta=...))",
    ),
}

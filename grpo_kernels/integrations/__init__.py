"""Drop-ins for other packages: ``trl`` (FusedGRPOTrainer, patch_trl) and ``liger`` (its signatures)."""

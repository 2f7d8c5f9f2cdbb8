"""Drop-ins for other packages: ``trl`` (FusedGRPOTrainer, patch_trl), ``liger`` (its signatures), ``verl``."""

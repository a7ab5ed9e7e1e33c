"""Saving what peft made."""

from pathlib import Path
from unittest.mock import patch

from peft import PeftModel


def write(model: PeftModel, folder: Path) -> Path:
    """Write the adapter without the page about it, which takes peft longer than everything else."""
    with patch.object(model, "create_or_update_model_card"):
        model.save_pretrained(str(folder))
    return folder

"""Output of a conversion: weights written crash-safely, receipt and model card."""

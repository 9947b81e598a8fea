"""What a model's parts say: logit lens, direct logit attribution, patching, gradients at sites."""

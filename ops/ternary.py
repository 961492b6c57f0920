"""where, clamp, lerp, addcmul, masked_fill and other ops of three operands."""

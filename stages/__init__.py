"""How each step computes: data, teacher, dump, distillation, evaluation.

This file and those of the sub-packages import nothing, so that `stages.<x>.config` loads without torch.
"""

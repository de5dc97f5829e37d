"""All methods on one benchmark: STRIDE's variants and the baselines, scored and tabulated."""

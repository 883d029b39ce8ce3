"""The colours of all plots, safe for colour-blind readers (Okabe and Ito's, and a grey)."""

OURS, REFERENCE, OTHER = "#d55e00", "#0072b2", "#9a9a9a"  # prodigy-fused, prodigyopt, everything else

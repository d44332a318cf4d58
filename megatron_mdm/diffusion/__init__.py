"""The method: what t is drawn, what is masked, how losses are weighted. torch, numpy and scipy only; knows no ranks."""

"""How units and weights are judged, masked, chosen and removed, for the methods that prune."""

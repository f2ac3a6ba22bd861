"""Many small segments become one large one, while everything else goes on."""

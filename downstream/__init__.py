"""The paper's two drop-in systems on QLIP."""

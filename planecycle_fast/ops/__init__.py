"""Single operations. Each `<op>` has its pure-PyTorch reference `<op>_ref` beside it, same signature."""

from .plane_switch import plane_switch, plane_switch_ref

__all__ = ["plane_switch", "plane_switch_ref"]

from .cluster.state_backup import back_up_state as back_up_state
from .cluster.state_backup import restore_state as restore_state
from .cluster.state_backup import state_backups as state_backups
from .config import load as load
from .process import only_one as only_one
from .serve import serve as serve
from .serve_agent import serve_agent as serve_agent

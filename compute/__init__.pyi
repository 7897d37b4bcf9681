from .config import load as load
from .serve import serve as serve
from .serve_agent import serve_agent as serve_agent

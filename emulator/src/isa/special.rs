//! Special registers, and the rows that are filled when a frame is made.

use super::window::{RESERVED_FOR_GROUPS, SHARED_BASE};

/// A value put in a row when a frame is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Preload {
    Bits(u64),
    Special(Special),
    /// Address in local memory of an offset in the frame.
    Frame(u64),
    /// Address of a module variable in its own space, plus an offset.
    Variable(u32, i64),
    FunctionAddress(u32),
}

/// Special registers that do not change while a thread runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    ClusterId(u8),
    NclusterId(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterCtarank,
    ClusterNctarank,
    IsExplicitCluster,
    LaneId,
    WarpId,
    NwarpId,
    SmId,
    NsmId,
    GridId,
    LanemaskEq,
    LanemaskLe,
    LanemaskLt,
    LanemaskGe,
    LanemaskGt,
    TotalSmem,
    DynamicSmem,
    /// Offset into the shared memory that is reserved for the system and for cooperative groups.
    ReservedSmem(u16),
    /// Upper (1) or lower (2) half of the address of the workspace for grid synchronisation.
    GridWorkspace(u8),
    Zero,
}

impl Special {
    /// Returns the special register of this name, which includes the `%`.
    pub fn parse(name: &str) -> Option<Special> {
        let name = name.strip_prefix('%')?;
        if let Some((base, axis)) = name.rsplit_once('.') {
            let axis = match axis {
                "x" => 0,
                "y" => 1,
                "z" => 2,
                _ => return None,
            };
            return Some(match base {
                "tid" => Special::Tid(axis),
                "ntid" => Special::Ntid(axis),
                "ctaid" => Special::Ctaid(axis),
                "nctaid" => Special::Nctaid(axis),
                "clusterid" => Special::ClusterId(axis),
                "nclusterid" => Special::NclusterId(axis),
                "cluster_ctaid" => Special::ClusterCtaid(axis),
                "cluster_nctaid" => Special::ClusterNctaid(axis),
                _ => return None,
            });
        }
        Some(match name {
            "cluster_ctarank" => Special::ClusterCtarank,
            "cluster_nctarank" => Special::ClusterNctarank,
            "is_explicit_cluster" => Special::IsExplicitCluster,
            "laneid" => Special::LaneId,
            "warpid" => Special::WarpId,
            "nwarpid" => Special::NwarpId,
            "smid" => Special::SmId,
            "nsmid" => Special::NsmId,
            "gridid" => Special::GridId,
            "lanemask_eq" => Special::LanemaskEq,
            "lanemask_le" => Special::LanemaskLe,
            "lanemask_lt" => Special::LanemaskLt,
            "lanemask_ge" => Special::LanemaskGe,
            "lanemask_gt" => Special::LanemaskGt,
            "total_smem_size" | "aggr_smem_size" => Special::TotalSmem,
            "dynamic_smem_size" => Special::DynamicSmem,
            "reserved_smem_offset_begin" | "reserved_smem_offset_0" => Special::ReservedSmem(0),
            "reserved_smem_offset_1" => Special::ReservedSmem(RESERVED_FOR_GROUPS as u16),
            "reserved_smem_offset_end" | "reserved_smem_offset_cap" => Special::ReservedSmem(SHARED_BASE as u16),
            "envreg1" => Special::GridWorkspace(1),
            "envreg2" => Special::GridWorkspace(2),
            "current_graph_exec" => Special::Zero,
            _ => return None,
        })
    }
}

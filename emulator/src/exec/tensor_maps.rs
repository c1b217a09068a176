//! Tensor maps in memory: reads a map for a copy, and executes `tensormap.replace` and `tensormap.cp_fenceproxy`,
//! with which a kernel makes its own maps.

use super::Cluster;
use super::access::{Access, Act, Target, effective};
use super::bulk::access_of;
use super::warp::Warp;
use crate::error::Error;
use crate::isa::Instr;
use crate::isa::types::{Addr, Slot};
use crate::report::FindingKind;
use crate::tensor::tensor_map::{Field, TENSOR_MAP_BYTES, TensorMap};

type MapBytes = [u8; TENSOR_MAP_BYTES];

impl<'m> Cluster<'m> {
    /// Reads the 128 bytes of a tensor map.
    pub(super) fn tensor_map(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        lane: usize,
        addr: &Addr,
    ) -> Result<Option<TensorMap>, Error> {
        let address = effective(addr, warp.frame().row(addr.base)[lane]);
        let access = Access {
            align: 64,
            ..access_of(lane, address, addr.space, TENSOR_MAP_BYTES, false)
        };
        let Some(target) = self.locate(warp, instr, access)? else {
            return Ok(None);
        };
        self.map_is_defined(warp, instr, lane, target);
        let bytes = self.map_bytes(warp, lane, target);
        match TensorMap::decode(&bytes) {
            Ok(map) => Ok(Some(map)),
            Err(error) => Err(self.fault(warp, instr.line, error.to_string())),
        }
    }

    fn map_bytes(&self, warp: &Warp, lane: usize, target: Target) -> MapBytes {
        let mut bytes = [0; TENSOR_MAP_BYTES];
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = self.peek(warp, lane, target, index * 8, 8);
            word.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Checks that no byte of a map is undefined, since a map determines addresses and sizes.
    fn map_is_defined(&mut self, warp: &Warp, instr: &Instr, lane: usize, target: Target) {
        if self.lacks(warp, lane, target, TENSOR_MAP_BYTES) {
            let actor = self.actor(warp);
            self.report(
                FindingKind::Uninitialized,
                instr.line,
                actor,
                (Some(lane), None),
                || "a tensor map, some bytes of which were never written".to_owned(),
            );
        }
    }

    fn put_map(&mut self, warp: &mut Warp, lane: usize, target: Target, bytes: &MapBytes) {
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            let value = crate::memory::shared::load(word);
            self.poke(warp, lane, target, index * 8, 8, value);
        }
    }

    /// Finds and checks the memory of a whole map.
    fn map_at(&mut self, warp: &mut Warp, instr: &Instr, access: Access) -> Result<Option<Target>, Error> {
        let target = self.locate(warp, instr, access)?;
        if let Some(target) = target {
            if !access.write {
                self.map_is_defined(warp, instr, access.lane, target);
            }
            let site = self.site(warp);
            self.observe(warp, instr, site, access, target, Act::of(access));
        }
        Ok(target)
    }

    pub(super) fn replace_field(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        lane: usize,
        addr: &Addr,
        field: Field,
        value: Slot,
    ) -> Result<(), Error> {
        let address = effective(addr, warp.frame().row(addr.base)[lane]);
        let whole = |write| Access {
            align: 64,
            ..access_of(lane, address, addr.space, TENSOR_MAP_BYTES, write)
        };
        let Some(target) = self.map_at(warp, instr, whole(false))? else {
            return Ok(());
        };
        self.map_at(warp, instr, whole(true))?;
        let mut bytes = self.map_bytes(warp, lane, target);
        let value = warp.frame().row(value)[lane];
        if let Err(error) = TensorMap::replace(&mut bytes, field, value) {
            let actor = self.actor(warp);
            let place = (Some(lane), Some(address));
            self.report(FindingKind::InvalidOperand, instr.line, actor, place, || {
                error.to_string()
            });
            return Ok(());
        }
        self.put_map(warp, lane, target, &bytes);
        Ok(())
    }

    /// Copies a map from shared to global memory, where copies can use it.
    pub(super) fn publish_map(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        mask: u32,
        dst: &Addr,
        src: &Addr,
    ) -> Result<(), Error> {
        let lane = mask.trailing_zeros() as usize;
        let address = |addr: &Addr| effective(addr, warp.frame().row(addr.base)[lane]);
        let (to, from) = (address(dst), address(src));
        let access = |address, space, write| Access {
            align: TENSOR_MAP_BYTES as u64,
            ..access_of(lane, address, space, TENSOR_MAP_BYTES, write)
        };
        let Some(source) = self.map_at(warp, instr, access(from, src.space, false))? else {
            return Ok(());
        };
        let Some(target) = self.map_at(warp, instr, access(to, dst.space, true))? else {
            return Ok(());
        };
        let bytes = self.map_bytes(warp, lane, source);
        self.put_map(warp, lane, target, &bytes);
        Ok(())
    }
}
